"""The nodes that call the broker directly give what stock nodes give with stock loaders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from graphs import Graph, Link, Loaders
from workflows import NEGATIVE, PICTURE, POSITIVE

TILES = {"tile_size": 128, "overlap": 32}
# What stock nodes ask for besides, for videos.
TIMES = {"temporal_size": 64, "temporal_overlap": 8}
SIZES = {"width": 640, "height": 512, "crop_w": 16, "crop_h": 8, "target_width": 512, "target_height": 384}

Build = Callable[[Loaders], Graph]


def keep_conditionings(graph: Graph, *conditionings: Link) -> Graph:
    for at, conditioning in enumerate(conditionings):
        graph.add("LunaBrokerTestsKeepConditioning", conditioning=conditioning, name=f"prompt-{at}")
    return graph


def vae(loaders: Loaders) -> Graph:
    graph = Graph()
    pixels = graph.add("LoadImage", image=PICTURE).out()
    if loaders.mode is None:
        loaded = loaders.vae(graph, "kl.safetensors")
        latent = graph.add("VAEEncode", pixels=pixels, vae=loaded).out()
        image = graph.add("VAEDecode", samples=latent, vae=loaded).out()
    else:
        shared = {"vae_name": "kl.safetensors", "broker": loaders.broker}
        latent = graph.add("LunaBrokerVAEEncode", pixels=pixels, **shared).out()
        image = graph.add("LunaBrokerVAEDecode", samples=latent, **shared).out()
    graph.add("LunaBrokerTestsKeepLatent", samples=latent, name="latent")
    graph.add("LunaBrokerTestsKeepImage", images=image, name="image")
    return graph


def vae_tiled(loaders: Loaders) -> Graph:
    graph = Graph()
    picture = graph.add("LoadImage", image=PICTURE).out()
    scaled = {"upscale_method": "bilinear", "width": 208, "height": 144, "crop": "disabled"}
    pixels = graph.add("ImageScale", image=picture, **scaled).out()
    if loaders.mode is None:
        loaded = loaders.vae(graph, "kl.safetensors")
        latent = graph.add("VAEEncodeTiled", pixels=pixels, vae=loaded, **TILES, **TIMES).out()
        image = graph.add("VAEDecodeTiled", samples=latent, vae=loaded, **TILES, **TIMES).out()
    else:
        shared = {"vae_name": "kl.safetensors", "broker": loaders.broker, **TILES}
        latent = graph.add("LunaBrokerVAEEncodeTiled", pixels=pixels, **shared).out()
        image = graph.add("LunaBrokerVAEDecodeTiled", samples=latent, **shared).out()
    graph.add("LunaBrokerTestsKeepLatent", samples=latent, name="latent")
    graph.add("LunaBrokerTestsKeepImage", images=image, name="image")
    return graph


def clip(loaders: Loaders) -> Graph:
    graph = Graph()
    if loaders.mode is None:
        loaded = loaders.clip(graph, "clip_l.safetensors")
        skipped = graph.add("CLIPSetLastLayer", clip=loaded, stop_at_clip_layer=-2).out()
        return keep_conditionings(graph, graph.add("CLIPTextEncode", clip=skipped, text=POSITIVE).out())
    shared = {"clip_name1": "clip_l.safetensors", "clip_name2": "none", "clip_skip": 2, "broker": loaders.broker}
    return keep_conditionings(graph, graph.add("LunaBrokerCLIPTextEncode", text=POSITIVE, **shared).out())


def clip_dual(loaders: Loaders) -> Graph:
    graph = Graph()
    if loaders.mode is None:
        loaded = loaders.clip(graph, "clip_l.safetensors")
        prompts = [graph.add("CLIPTextEncode", clip=loaded, text=text).out() for text in (POSITIVE, NEGATIVE)]
        return keep_conditionings(graph, *prompts)
    shared = {"clip_name1": "clip_l.safetensors", "clip_name2": "none", "clip_skip": 0, "broker": loaders.broker}
    both = graph.add("LunaBrokerCLIPTextEncodeDual", positive=POSITIVE, negative=NEGATIVE, **shared)
    return keep_conditionings(graph, both.out(0), both.out(1))


def clip_sdxl(loaders: Loaders) -> Graph:
    graph = Graph()
    if loaders.mode is None:
        loaded = loaders.checkpoint(graph, "sdxl.safetensors").clip
        words = [(POSITIVE, "other words"), (NEGATIVE, NEGATIVE)]
        prompts = [
            graph.add("CLIPTextEncodeSDXL", clip=loaded, text_l=text_l, text_g=text_g, **SIZES).out()
            for text_l, text_g in words
        ]
        return keep_conditionings(graph, *prompts)
    shared = {"clip_name1": "sdxl.safetensors", "clip_name2": "none", "clip_skip": 0, "broker": loaders.broker}
    words = {"positive": POSITIVE, "negative": NEGATIVE, "positive_g": "other words"}
    both = graph.add("LunaBrokerCLIPTextEncodeSDXL", **words, **SIZES, **shared)
    return keep_conditionings(graph, both.out(0), both.out(1))


@pytest.mark.parametrize("build", [vae, vae_tiled, clip, clip_dual, clip_sdxl])
def test_gives_what_the_stock_node_gives(build: Build, side, loaders):
    side("remote").check(build, loaders("remote"))


def test_status_says_what_the_broker_does(side, loaders, broker):
    worker = side("remote").worker
    # Who has only asked is in no list of sessions.
    worker.run(clip(loaders("remote"))).ok()
    graph = Graph()
    graph.add("LunaBrokerStatus", broker=broker.address)
    text = worker.run(graph).ok().text
    assert broker.address in text and f"comfyui-{worker.pid}" in text, text
    assert "shm" in text, f"the rung is not named: {text}"
