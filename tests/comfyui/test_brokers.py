"""Where a broker is, what it has, and what a worker's user sees of its work."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
from compare import assert_different, assert_equal, assert_near
from graphs import Loaders
from workflows import STEPS, through_gateway, txt2img

import broker as brokers


def compare(mode: str):
    return assert_equal if mode == "attached" else assert_near


@pytest.mark.parametrize("mode", ["remote", "attached"])
def test_services_may_have_brokers_of_their_own(mode, worker, start_broker, reference):
    vae, rest = start_broker("--services", "vae"), start_broker("--services", "unet,clip")
    address = f"vae={vae.address},unet={rest.address},clip={rest.address}"
    compare(mode)(worker.run(txt2img(Loaders(mode, address))).ok(), reference(txt2img))
    for broker in (vae, rest):
        worked = brokers.holds_weights(broker, worker.pid) or any(brokers.completed(broker).values())
        assert worked, f"nothing was asked of {broker.address}"


@pytest.mark.parametrize("mode", ["remote", "attached"])
def test_a_file_that_only_the_broker_has(mode, worker, start_broker, models, tmp_path, reference):
    os.link(models / "checkpoints" / "small.safetensors", tmp_path / "of the broker.safetensors")
    broker = start_broker("--models", str(tmp_path))
    result = worker.run(txt2img(Loaders(mode, broker.address), checkpoint="of the broker.safetensors")).ok()
    compare(mode)(result, reference(txt2img))


@pytest.mark.parametrize("mode", ["auto", "remote", "attached", "local"])
def test_the_loader_says_where_the_model_runs(mode, worker, loaders, reference):
    result = worker.run(txt2img(loaders(mode), seed=3)).ok()
    # On a worker without a GPU, whose broker has none either, nothing is copied.
    expected = "attached" if mode == "auto" else mode
    assert expected in result.text, result.text
    compare("remote" if mode == "remote" else "attached")(result, reference(partial(txt2img, seed=3)))


def test_progress_and_previews_move_while_the_broker_computes(worker, loaders):
    result = worker.run(txt2img(loaders("remote"), seed=4)).ok()
    values = [message["data"]["value"] for message in result.messages if message["type"] == "progress"]
    assert values == list(range(1, STEPS + 1))
    assert result.previews >= STEPS


def test_the_gateway_sets_the_block_cache(worker, loaders, reference):
    def paint(**cache):
        graph = through_gateway(loaders("remote"), loaders("remote"), "a house", **cache)
        result = worker.run(graph).ok()
        return result, json.loads(result.outputs[graph.only("PreviewAny")]["text"][0])

    plain = reference(partial(txt2img, positive="a house"))
    never, told = paint(cache_threshold=0.9, cache_max_hits=0)
    assert_near(never, plain)
    assert told["block_cache"] is None
    often, told = paint(cache_threshold=0.9, cache_start=0.1, cache_end=0.9, cache_max_hits=2)
    assert_different(often, plain)
    assert told["block_cache"] == {"threshold": 0.9, "start": 0.1, "end": 0.9, "max_hits": 2}


def test_the_gateway_says_that_only_the_broker_has_a_block_cache(worker, loaders, reference):
    graph = through_gateway(loaders("attached"), loaders("attached"), "a house", cache_threshold=0.9)
    result = worker.run(graph).ok()
    assert "block cache" in result.text
    assert_equal(result, reference(partial(txt2img, positive="a house")))
