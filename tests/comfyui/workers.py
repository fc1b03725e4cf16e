"""Several ComfyUI processes at a time: what each of them paints, and what they cost together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from broker_process import BrokerProcess
from comfy import ComfyUI
from graphs import STOCK, Graph, Loaders
from workflows import txt2img

from memory import total_mib

# LoRAs of each of four workers, whose names begin with their mode.
STACKS = {
    "remote-1": [("lora.safetensors", 0.8, 0.4)],
    "remote-2": [("second.safetensors", 0.7, 0.7), ("lokr.safetensors", 0.5, 0.5)],
    "attached-1": [("dora.safetensors", 0.6, 0.6)],
    "attached-2": [("loha.safetensors", 0.9, 0.2), ("lora.safetensors", -0.4, 0.3)],
}
WEIGHTY = partial(txt2img, checkpoint="wide.safetensors", steps=2)

StartComfyUI = Callable[..., ComfyUI]


class Growth(NamedTuple):
    """What all processes together cost, in MiB, with one worker, with two, ...; and what the last cost while idle."""

    totals: list[int]
    idle: int

    @property
    def last(self) -> int:
        """What the last worker added, once it had painted."""
        return self.totals[-1] - self.totals[-2]


def stacked(name: str, address: str, **sampler: Any) -> Graph:
    """The workflow of one of the four."""
    return txt2img(Loaders(name.partition("-")[0], address), loras=STACKS[name], **sampler)


def grow(start: StartComfyUI, mode: str, count: int, broker: BrokerProcess | None) -> Growth:
    """Starts workers one after the other, has each paint, and stops them all. Stock ones need no broker."""
    loaders = STOCK if broker is None else Loaders(mode, broker.address)
    pids = [] if broker is None else [broker.pid]
    workers: list[ComfyUI] = []
    totals, idle = [], 0
    for at in range(count):
        before = total_mib(pids)
        worker = start(f"memory-{mode}-{at}", broker is not None)
        workers.append(worker)
        pids.append(worker.pid)
        idle = total_mib(pids) - before
        worker.run(WEIGHTY(loaders)).ok()
        totals.append(total_mib(pids))
    for worker in workers:
        worker.stop()
    return Growth(totals, idle)
