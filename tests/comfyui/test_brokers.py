"""Where a broker is, what it has, and what a worker's user sees of its work."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
from compare import assert_different, assert_near
from graphs import Loaders
from workflows import STEPS, through_gateway, txt2img

import broker as brokers


@pytest.mark.parametrize("mode", ["remote", "attached"])
def test_services_may_have_brokers_of_their_own(mode, side, start_broker):
    vae, rest = start_broker("--services", "vae"), start_broker("--services", "unet,clip")
    address = f"vae={vae.address},unet={rest.address},clip={rest.address}"
    side(mode).check(txt2img, Loaders(mode, address))
    for broker in (vae, rest):
        worked = brokers.holds_weights(broker, side(mode).worker.pid) or any(brokers.completed(broker).values())
        assert worked, f"nothing was asked of {broker.address}"


@pytest.mark.parametrize("mode", ["remote", "attached"])
def test_a_file_that_only_the_broker_has(mode, side, start_broker, models, tmp_path):
    os.link(models / "checkpoints" / "small.safetensors", tmp_path / "of the broker.safetensors")
    broker = start_broker("--models", str(tmp_path))
    graph = txt2img(Loaders(mode, broker.address), checkpoint="of the broker.safetensors")
    side(mode).compare(side(mode).worker.run(graph).ok(), side(mode).reference(txt2img))


@pytest.mark.parametrize("mode", ["auto", "remote", "attached", "local"])
def test_the_loader_says_where_the_model_runs(mode, side, loaders):
    result = side("remote" if mode == "remote" else "attached").check(partial(txt2img, seed=3), loaders(mode))
    # On a worker without a GPU, whose broker has none either, nothing is copied.
    expected = "attached" if mode == "auto" else mode
    assert expected in result.text, result.text


def test_progress_and_previews_move_while_the_broker_computes(side, loaders):
    result = side("remote").worker.run(txt2img(loaders("remote"), seed=4)).ok()
    values = [message["data"]["value"] for message in result.messages if message["type"] == "progress"]
    assert values == list(range(1, STEPS + 1))
    assert result.previews >= STEPS


def test_the_gateway_sets_the_block_cache(side, loaders):
    remote = side("remote")

    def paint(**cache):
        graph = through_gateway(loaders("remote"), loaders("remote"), "a house", **cache)
        result = remote.worker.run(graph).ok()
        return result, json.loads(result.outputs[graph.only("PreviewAny")]["text"][0])

    plain = remote.reference(partial(txt2img, positive="a house"))
    never, told = paint(cache_threshold=0.9, cache_max_hits=0)
    assert_near(never, plain)
    assert told["block_cache"] is None
    often, told = paint(cache_threshold=0.9, cache_start=0.1, cache_end=0.9, cache_max_hits=2)
    assert_different(often, plain)
    assert told["block_cache"] == {"threshold": 0.9, "start": 0.1, "end": 0.9, "max_hits": 2}


def test_the_gateway_says_that_only_the_broker_has_a_block_cache(side, loaders):
    attached = side("attached")
    graph = through_gateway(loaders("attached"), loaders("attached"), "a house", cache_threshold=0.9)
    result = attached.worker.run(graph).ok()
    assert "block cache" in result.text
    attached.compare(result, attached.reference(partial(txt2img, positive="a house")))
