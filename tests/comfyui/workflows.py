"""Workflows in API format. How a workflow gets its models is a parameter; everything else is stock nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphs import Graph, Link, Loaders, Models

PICTURE = "picture.png"
POSITIVE = "a (red:1.3) house by the sea, [cloudy] sky"
NEGATIVE = "blurry, text"
# Sides that differ, so that none is taken for the other.
WIDTH, HEIGHT = 128, 64
STEPS = 4
SEED = 7
CFG = 4.0


@dataclass
class Painting:
    """A workflow under construction: what the sampler is going to be given."""

    graph: Graph
    models: Models
    positive: Link
    negative: Link
    latent: Link
    sampler: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> Graph:
        """Samples, decodes, keeps latent and picture."""
        latent = self.sample()
        image = self.graph.add("VAEDecode", samples=latent, vae=self.models.vae).out()
        self.graph.add("LunaBrokerTestsKeepImage", images=image, name="image")
        return self.graph

    def sample(self) -> Link:
        settings = {
            "seed": SEED,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            **self.sampler,
        }
        latent = self.graph.add(
            "KSampler",
            model=self.models.model,
            positive=self.positive,
            negative=self.negative,
            latent_image=self.latent,
            **settings,
        ).out()
        self.graph.add("LunaBrokerTestsKeepLatent", samples=latent, name="latent")
        return latent


def painting(
    loaders: Loaders,
    checkpoint: str = "small.safetensors",
    positive: str = POSITIVE,
    loras: Sequence[tuple[str, float, float]] = (),
    clip_skip: int | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    **sampler: Any,
) -> Painting:
    """Text to picture up to the sampler. `loras`: file, strength on the UNet, strength on the text encoder."""
    graph = Graph()
    models = loaders.checkpoint(graph, checkpoint)
    for file, on_model, on_clip in loras:
        adapted = graph.add(
            "LoraLoader",
            model=models.model,
            clip=models.clip,
            lora_name=file,
            strength_model=on_model,
            strength_clip=on_clip,
        )
        models = Models(adapted.out(0), adapted.out(1), models.vae)
    clip = models.clip
    if clip_skip is not None:
        clip = graph.add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=clip_skip).out()
    return Painting(
        graph,
        models,
        graph.add("CLIPTextEncode", clip=clip, text=positive).out(),
        graph.add("CLIPTextEncode", clip=clip, text=NEGATIVE).out(),
        graph.add("EmptyLatentImage", width=width, height=height, batch_size=1).out(),
        dict(sampler),
    )


def txt2img(loaders: Loaders, **choices: Any) -> Graph:
    return painting(loaders, **choices).finish()


def img2img(loaders: Loaders) -> Graph:
    paint = painting(loaders, denoise=0.6)
    pixels = paint.graph.add("LoadImage", image=PICTURE).out()
    paint.latent = paint.graph.add("VAEEncode", pixels=pixels, vae=paint.models.vae).out()
    return paint.finish()


def inpaint(loaders: Loaders) -> Graph:
    """The way for UNets that know nothing of masks."""
    paint = painting(loaders)
    picture = paint.graph.add("LoadImage", image=PICTURE)
    paint.latent = paint.graph.add(
        "VAEEncodeForInpaint", pixels=picture.out(0), mask=picture.out(1), vae=paint.models.vae, grow_mask_by=6
    ).out()
    return paint.finish()


def inpaint_model(loaders: Loaders) -> Graph:
    """The way for UNets with nine input channels. Each part has a loader of its own."""
    graph = Graph()
    clip = loaders.clip(graph, "clip_l.safetensors")
    vae = loaders.vae(graph, "kl.safetensors")
    models = Models(loaders.unet(graph, "inpaint.safetensors"), clip, vae)
    positive = graph.add("CLIPTextEncode", clip=clip, text=POSITIVE).out()
    negative = graph.add("CLIPTextEncode", clip=clip, text=NEGATIVE).out()
    picture = graph.add("LoadImage", image=PICTURE)
    conditioned = graph.add(
        "InpaintModelConditioning",
        positive=positive,
        negative=negative,
        vae=vae,
        pixels=picture.out(0),
        mask=picture.out(1),
        noise_mask=True,
    )
    return Painting(graph, models, conditioned.out(0), conditioned.out(1), conditioned.out(2)).finish()


def separate_files(loaders: Loaders) -> Graph:
    graph = Graph()
    clip = loaders.clip(graph, "clip_l.safetensors")
    models = Models(loaders.unet(graph, "bare.safetensors"), clip, loaders.vae(graph, "kl.safetensors"))
    positive = graph.add("CLIPTextEncode", clip=clip, text=POSITIVE).out()
    negative = graph.add("CLIPTextEncode", clip=clip, text=NEGATIVE).out()
    latent = graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=2).out()
    return Painting(graph, models, positive, negative, latent).finish()


def controlnet(loaders: Loaders) -> Graph:
    paint = painting(loaders)
    graph = paint.graph
    pixels = graph.add("LoadImage", image=PICTURE).out()
    applied = graph.add(
        "ControlNetApplyAdvanced",
        positive=paint.positive,
        negative=paint.negative,
        control_net=graph.add("ControlNetLoader", control_net_name="small.safetensors").out(),
        image=pixels,
        strength=0.8,
        start_percent=0.0,
        end_percent=0.9,
    )
    paint.positive, paint.negative = applied.out(0), applied.out(1)
    return paint.finish()


def tiled_vae(loaders: Loaders) -> Graph:
    """Encodes and decodes in tiles that do not fit evenly, without a sampler in between."""
    graph = Graph()
    vae = loaders.vae(graph, "kl.safetensors")
    picture = graph.add("LoadImage", image=PICTURE).out()
    pixels = graph.add(
        "ImageScale", image=picture, upscale_method="bilinear", width=208, height=144, crop="disabled"
    ).out()
    tiles = {"tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    latent = graph.add("VAEEncodeTiled", pixels=pixels, vae=vae, **tiles).out()
    graph.add("LunaBrokerTestsKeepLatent", samples=latent, name="latent")
    image = graph.add("VAEDecodeTiled", samples=latent, vae=vae, **tiles).out()
    graph.add("LunaBrokerTestsKeepImage", images=image, name="image")
    return graph


def hooks(loaders: Loaders) -> Graph:
    """A LoRA on the positive prompt alone, whose strength changes while sampling."""
    paint = painting(loaders)
    graph = paint.graph
    lora = graph.add("CreateHookLora", lora_name="lora.safetensors", strength_model=0.9, strength_clip=0.7).out()
    early = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0).out()
    late = graph.add("CreateHookKeyframe", strength_mult=0.3, start_percent=0.5, prev_hook_kf=early).out()
    scheduled = graph.add("SetHookKeyframes", hooks=lora, hook_kf=late).out()
    clip = graph.add(
        "SetClipHooks", clip=paint.models.clip, apply_to_conds=True, schedule_clip=True, hooks=scheduled
    ).out()
    paint.positive = graph.add("CLIPTextEncode", clip=clip, text=POSITIVE).out()
    return paint.finish()


def sdxl(loaders: Loaders) -> Graph:
    """Size conditioning, other words for each text encoder, and one prompt that is longer than the other."""
    graph = Graph()
    models = loaders.checkpoint(graph, "sdxl.safetensors")
    sizes = {"width": 640, "height": 512, "crop_w": 16, "crop_h": 8, "target_width": 512, "target_height": 384}
    long = ", ".join(["many words"] * 45)
    positive = graph.add("CLIPTextEncodeSDXL", clip=models.clip, text_g=long, text_l=POSITIVE, **sizes).out()
    negative = graph.add("CLIPTextEncodeSDXL", clip=models.clip, text_g=NEGATIVE, text_l=NEGATIVE, **sizes).out()
    latent = graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1).out()
    return Painting(graph, models, positive, negative, latent).finish()


def refiner(loaders: Loaders) -> Graph:
    graph = Graph()
    models = loaders.checkpoint(graph, "refiner.safetensors")
    sizes = {"width": 640, "height": 512, "clip": models.clip}
    positive = graph.add("CLIPTextEncodeSDXLRefiner", ascore=6.0, text=POSITIVE, **sizes).out()
    negative = graph.add("CLIPTextEncodeSDXLRefiner", ascore=2.5, text=NEGATIVE, **sizes).out()
    latent = graph.add("EmptyLatentImage", width=128, height=64, batch_size=1).out()
    return Painting(graph, models, positive, negative, latent).finish()


def guidance(loaders: Loaders) -> Graph:
    """What changes sampling but not the UNet: another parametrisation, and rescaled guidance."""
    paint = painting(loaders)
    sampling = paint.graph.add("ModelSamplingDiscrete", model=paint.models.model, sampling="v_prediction", zsnr=True)
    rescaled = paint.graph.add("RescaleCFG", model=sampling.out(), multiplier=0.7)
    paint.models = paint.models._replace(model=rescaled.out())
    return paint.finish()


def easy_cache(loaders: Loaders) -> Graph:
    paint = painting(loaders, steps=8)
    cached = paint.graph.add(
        "EasyCache", model=paint.models.model, reuse_threshold=0.5, start_percent=0.1, end_percent=0.95, verbose=False
    )
    paint.models = paint.models._replace(model=cached.out())
    return paint.finish()


def merged(loaders: Loaders) -> Graph:
    """A part of each of two UNets."""
    paint = painting(loaders)
    other = loaders.checkpoint(paint.graph, "other.safetensors")
    model = paint.graph.add("ModelMergeSimple", model1=paint.models.model, model2=other.model, ratio=0.6).out()
    paint.models = paint.models._replace(model=model)
    return paint.finish()


def merged_text_encoders(loaders: Loaders) -> Graph:
    paint = painting(loaders)
    other = loaders.checkpoint(paint.graph, "other.safetensors")
    clip = paint.graph.add("CLIPMergeSimple", clip1=paint.models.clip, clip2=other.clip, ratio=0.3).out()
    paint.positive = paint.graph.add("CLIPTextEncode", clip=clip, text=POSITIVE).out()
    return paint.finish()


def patched(loaders: Loaders, patch: str | None, checkpoint: str = "wide.safetensors", **inputs: Any) -> Graph:
    """Text to picture with one node between loader and sampler that patches the UNet from inside."""
    paint = painting(loaders, checkpoint)
    if patch is not None:
        node = paint.graph.add(patch, model=paint.models.model, **inputs)
        paint.models = paint.models._replace(model=node.out())
    return paint.finish()


def routed(loaders: Loaders, source: str) -> Graph:
    """A checkpoint, or a diffusion model with its parts, by the pack's router."""
    graph = Graph()
    names = {"ckpt_name": "none", "unet_name": "none", "clip_name1": "none", "clip_name2": "none", "vae_name": "none"}
    if source == "checkpoint":
        names["ckpt_name"] = "small.safetensors"
    else:
        names |= {"unet_name": "bare.safetensors", "clip_name1": "clip_l.safetensors", "vae_name": "kl.safetensors"}
    if loaders.mode is not None:
        router = graph.add(
            "LunaBrokerModelRouter", source=source, type="stable_diffusion", **names, **loaders.choices()
        )
        models = Models(router.out(0), router.out(1), router.out(2))
    elif source == "checkpoint":
        models = loaders.checkpoint(graph, names["ckpt_name"])
    else:
        clip, vae = loaders.clip(graph, names["clip_name1"]), loaders.vae(graph, names["vae_name"])
        models = Models(loaders.unet(graph, names["unet_name"]), clip, vae)
    positive = graph.add("CLIPTextEncode", clip=models.clip, text=POSITIVE).out()
    negative = graph.add("CLIPTextEncode", clip=models.clip, text=NEGATIVE).out()
    latent = graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1).out()
    return Painting(graph, models, positive, negative, latent).finish()


def through_gateway(on_model: Loaders, on_clip: Loaders, positive: str, **cache: float) -> Graph:
    """LoRAs and prompts by the pack's gateway, with MODEL and CLIP from loaders of their own."""
    graph = Graph()
    models = on_model.checkpoint(graph, "small.safetensors")
    clip = models.clip if on_clip == on_model else on_clip.checkpoint(graph, "small.safetensors").clip
    settings = {"cache_threshold": 0.0, "cache_start": 0.0, "cache_end": 1.0, "cache_max_hits": -1, **cache}
    gateway = graph.add(
        "LunaBrokerConfigGateway", model=models.model, clip=clip, positive=positive, negative=NEGATIVE, **settings
    )
    graph.add("PreviewAny", source=gateway.out(7))
    latent = graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1).out()
    models = Models(gateway.out(0), gateway.out(1), models.vae)
    return Painting(graph, models, gateway.out(2), gateway.out(3), latent).finish()
