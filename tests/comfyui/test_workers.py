"""Four ComfyUI processes on one broker, two of them remote and two attached, each with LoRAs of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import luna_broker
import pytest
from comfy import ComfyUI
from compare import assert_different, assert_equal, assert_near
from conftest import StartComfyUI
from workflows import STOCK, Loaders, txt2img

import broker as brokers
from memory import table, total_mib

STACKS = {
    "remote-1": [("lora.safetensors", 0.8, 0.4)],
    "remote-2": [("second.safetensors", 0.7, 0.7), ("lokr.safetensors", 0.5, 0.5)],
    "attached-1": [("dora.safetensors", 0.6, 0.6)],
    "attached-2": [("loha.safetensors", 0.9, 0.2), ("lora.safetensors", -0.4, 0.3)],
}
ROUNDS = 2
WEIGHTY = partial(txt2img, checkpoint="wide.safetensors", steps=2)


class Growth(NamedTuple):
    """What all processes together cost, in MiB, with one worker, with two, ...; and what the last cost while idle."""

    totals: list[int]
    idle: int

    @property
    def last(self) -> int:
        """What the last worker added once it had painted."""
        return self.totals[-1] - self.totals[-2]


@pytest.fixture(scope="module")
def four(comfyui: StartComfyUI) -> dict[str, ComfyUI]:
    return {name: comfyui(name, True) for name in STACKS}


def paint(name: str, address: str, **more):
    """The workflow of one of the four."""
    return txt2img(Loaders(name.split("-")[0], address), loras=STACKS[name], **more)


def test_concurrent_workers_paint_what_each_paints_alone(four, broker):
    alone = {}
    for name, process in four.items():
        for at in range(ROUNDS):
            alone[name, at] = process.run(paint(name, broker.address, seed=at)).ok()
    for name, other in zip(STACKS, [*STACKS][1:], strict=False):
        assert_different(alone[name, 0], alone[other, 0])
    before = brokers.digests(broker)
    assert before, "nothing was attached"

    for at in range(ROUNDS):
        for process in four.values():
            # Else the answer is what ComfyUI keeps of the run alone.
            process.free()
        prompts = {name: process.queue(paint(name, broker.address, seed=at)) for name, process in four.items()}
        for name, process in four.items():
            result = process.wait(prompts[name]).ok()
            near = assert_equal if name.startswith("attached") else assert_near
            near(result, alone[name, at])

    with luna_broker.connect(broker.address) as client:
        for name in before:
            for found in client.verify(name):
                assert found["found"] == found["expected"], f"{name} was written to"
    assert brokers.digests(broker) == before


@pytest.fixture
def grow(comfyui: StartComfyUI, start_broker) -> Callable[[str, int], Growth]:
    """Starts workers one after the other, has each paint, and says what all processes together cost; stops them."""

    def measure(mode: str, count: int) -> Growth:
        broker = start_broker() if mode != "stock" else None
        loaders = STOCK if broker is None else Loaders(mode, broker.address)
        pids = [] if broker is None else [broker.pid]
        workers: list[ComfyUI] = []
        totals, idle = [], 0
        for at in range(count):
            before = total_mib(pids)
            worker = comfyui(f"memory-{mode}-{at}", mode != "stock")
            workers.append(worker)
            pids.append(worker.pid)
            idle = total_mib(pids) - before
            worker.run(WEIGHTY(loaders)).ok()
            totals.append(total_mib(pids))
        for worker in workers:
            worker.stop()
        if broker is not None:
            broker.stop()
        return Growth(totals, idle)

    return measure


def test_a_further_worker_costs_an_idle_one_and_next_to_nothing_of_the_weights(grow, broker, capsys):
    grown = {"stock": grow("stock", 2), "attached": grow("attached", 4), "remote": grow("remote", 4)}
    with capsys.disabled():
        print(
            "\n" + table("Sum of PSS, MiB, of the broker and", {name: growth.totals for name, growth in grown.items()})
        )
        print(", ".join(f"idle worker ({name}): {growth.idle} MiB" for name, growth in grown.items()))
    weights = brokers.weights_mib(broker, "wide.safetensors")
    # Else the comparison shows nothing: these are what the others do without.
    assert grown["stock"].last > grown["stock"].idle + 0.8 * weights
    for mode in ("attached", "remote"):
        allowed = grown[mode].idle + 0.05 * weights
        assert grown[mode].last <= allowed, f"{mode}: {grown[mode].last} MiB, allowed are {allowed:.0f}"
