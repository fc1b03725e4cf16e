"""The eight tests of the pack that this one follows, as they were named there."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from comfy import ComfyUI, PromptRefused
from compare import assert_different, assert_equal, assert_near, difference
from graphs import Graph, Loaders
from workers import STACKS, stacked
from workflows import routed, through_gateway, txt2img

import broker as brokers
from memory import total_mib

LORA = "lora.safetensors"
SECOND = "second.safetensors"
STACK = [(LORA, 0.8, 0.6), (SECOND, -0.5, 0.5)]
# What a process may gain in fifty steps, by whatever its allocator keeps.
GROWTH_MIB = 24

MODES = pytest.mark.parametrize("mode", ["remote", "attached"])


def complaint(worker: ComfyUI, graph: Graph) -> str:
    """What ComfyUI says of a workflow that cannot work, before or while it runs."""
    try:
        error = worker.run(graph).error
    except PromptRefused as refusal:
        return str(refusal)
    assert error is not None, "the workflow worked"
    return str(error["exception_message"])


@MODES
@pytest.mark.parametrize("source", ["checkpoint", "diffusion model"])
def test_model_loads_through_the_router(mode, source, side, broker, loaders):
    before = brokers.completed(broker)["unet"]
    side(mode).check(partial(routed, source=source), loaders(mode))
    assert (brokers.completed(broker)["unet"] > before) == (mode == "remote")


def test_memory_per_instance(grown, broker):
    """A second instance that shares costs a fraction of a second one that does not."""
    weights = brokers.weights_mib(broker, "wide.safetensors")
    for mode in ("attached", "remote"):
        for number, (before, after) in enumerate(zip(grown[mode].totals, grown[mode].totals[1:], strict=False), 2):
            saved = grown["stock"].last - (after - before)
            assert saved > 0.8 * weights, f"{mode}: instance {number} saves {saved} of {weights:.0f} MiB"


@MODES
def test_lora_stack_applied_and_base_restored(mode, side, broker, loaders):
    base, adapted = txt2img, partial(txt2img, loras=STACK)
    assert_different(side(mode).reference(adapted), side(mode).reference(base))
    for build in (base, adapted, base, partial(txt2img, loras=STACK[:1]), base):
        result = side(mode).check(build, loaders(mode))
    assert base(loaders(mode)).only("KSampler") in result.ran, "ComfyUI answered with what it kept of the first base"
    for digests in brokers.verified(broker):
        assert digests["found"] == digests["expected"], f"{digests['name']} was written to"


@pytest.mark.parametrize("on_model", ["remote", "local"])
@pytest.mark.parametrize("on_clip", ["remote", "local"])
def test_mixed_remote_and_local_model_and_clip(on_model, on_clip, side, broker, loaders):
    """All four ways, with LoRAs that the prompt names, against stock loaders and stock nodes."""
    remote, before = side("remote"), brokers.completed(broker)
    graph = through_gateway(loaders(on_model), loaders(on_clip), f"a house <lora:{LORA}:0.8:0.6>")
    result = remote.worker.run(graph).ok()
    remote.compare(result, remote.reference(partial(txt2img, positive="a house", loras=[(LORA, 0.8, 0.6)])))
    after = brokers.completed(broker)
    assert (after["unet"] > before["unet"]) == (on_model == "remote")
    assert (after["clip"] > before["clip"]) == (on_clip == "remote")
    metadata = json.loads(result.outputs[graph.only("PreviewAny")]["text"][0])
    assert (metadata["model"], metadata["clip"]) == (on_model, on_clip)
    assert metadata["loras"] == [{"name": LORA, "model_strength": 0.8, "clip_strength": 0.6}]


def test_four_concurrent_instances_without_cross_talk(four, broker, side):
    """Each gives what a stock worker gives that has the machine to itself."""
    seeds = range(20, 22)
    for seed in seeds:
        graphs = {name: stacked(name, broker.address, seed=seed) for name in four}
        prompts = {name: process.queue(graphs[name]) for name, process in four.items()}
        for name, process in four.items():
            expected = side("remote").reference(partial(txt2img, loras=STACKS[name], seed=seed))
            compare = assert_equal if name.startswith("attached") else assert_near
            compare(process.wait(prompts[name]).ok(), expected)


def test_daemon_absent_bad_path_missing_lora(side, scratch, loaders):
    worker, reference = side("remote").worker, side("remote").reference
    nobody = str(scratch / "nobody.sock")
    absent = worker.run(txt2img(Loaders("remote", nobody)))
    assert absent.error is not None and nobody in absent.error["exception_message"]

    for mode in ("remote", "attached"):
        for missing in ("nothing.safetensors", "/nowhere/nothing.safetensors"):
            said = complaint(worker, txt2img(loaders(mode), checkpoint=missing))
            assert missing in said, said

    graph = through_gateway(loaders("remote"), loaders("remote"), f"a house <lora:nothing:0.7> <lora:{LORA}:0.8:0.6>")
    result = worker.run(graph).ok()
    assert "nothing" in result.text, f"nothing told the user: {result.text!r}"
    assert_near(result, reference(partial(txt2img, positive="a house", loras=[(LORA, 0.8, 0.6)])))


@MODES
def test_fifty_steps_without_growth(mode, side, broker, loaders):
    worker = side(mode).worker
    pids = [worker.pid, broker.pid]
    worker.run(txt2img(loaders(mode), loras=STACK, steps=8)).ok()
    before = total_mib(pids)
    worker.run(txt2img(loaders(mode), loras=STACK, steps=50)).ok()
    grown = total_mib(pids) - before
    assert grown <= GROWTH_MIB, f"{grown} MiB in fifty steps"


@MODES
def test_strength_0_is_base_between_is_proportional_and_stacks_combine(mode, side, loaders):
    """Proportional to first order: one step, a strength so small that its square is nothing, without guidance."""

    def conditioned(*loras: tuple[str, float, float]) -> np.ndarray:
        graph = txt2img(loaders(mode), loras=list(loras), steps=1, cfg=1.0)
        return side(mode).worker.run(graph).ok().tensor("latent").astype(np.float64)

    base = conditioned()
    assert difference(conditioned((LORA, 0.0, 0.0)), base) == 0
    whole, half = conditioned((LORA, 0.02, 0.0)) - base, conditioned((LORA, 0.01, 0.0)) - base
    other = conditioned((SECOND, 0.02, 0.0)) - base
    both = conditioned((LORA, 0.02, 0.0), (SECOND, 0.02, 0.0)) - base
    for got, expected in ((2 * half, whole), (both, whole + other)):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 0.05, f"off by {error:.3f} of what was expected"
    assert np.linalg.norm(whole) > 0 and np.linalg.norm(other) > 0
