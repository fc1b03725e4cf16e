"""The demo's second half: four workers paint one prompt at the same time, each with adapters of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
from broker_process import BrokerProcess
from crew import Crew
from small_checkpoint import write_checkpoint, write_lora

PROMPT = "ink and coloured glass, by nobody in particular"
NEGATIVE = "lowres, cropped"
SIZE_PX = 256
STEPS = 20
# Leaves out about half of the steps of such a model.
FB_CACHE = 0.2
# One stack for each worker: adapters by name, with strengths.
STACKS = (
    {"ink": 1.0},
    {"glass": 1.0},
    {"ink": 0.5, "glass": 0.5},
    {"ink": -1.0},
)
# Mean difference of two pictures, in 0…1, from which on nobody takes them for the same.
LEAST_DIFFERENCE = 0.05

Reply = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Paintings:
    """What four workers painted."""

    names: Sequence[str]
    captions: Sequence[str]
    pixels: Sequence[np.ndarray]
    replies: Sequence[Reply]
    # The lane of UNets in the broker's status.
    lane: Reply

    @property
    def tiles(self) -> list[tuple[str, np.ndarray]]:
        return list(zip(self.captions, self.pixels, strict=True))

    def verdicts(self) -> list[tuple[bool, str]]:
        return [self._pictures_differ(), self._counters_add_up()]

    def _pictures_differ(self) -> tuple[bool, str]:
        """Whether every stack made a picture of its own."""
        pairs = combinations(self.pixels, 2)
        least = min(float(np.abs(one - other).mean()) for one, other in pairs)
        differ = least >= LEAST_DIFFERENCE
        relation = "all differ" if differ else "do NOT all differ"
        return (
            differ,
            f"the pictures of {len(self.pixels)} stacks of adapters {relation}: by {least:.2f} or more on average",
        )

    def _counters_add_up(self) -> tuple[bool, str]:
        """Whether the broker counted every step, and left some of every worker's out."""
        asked, hits = STEPS * len(self.replies), [reply["hits"] for reply in self.replies]
        completed, batches = self.lane["completed"], self.lane["batches"]
        holds = completed >= asked and 0 < batches <= completed and 0 < min(hits) <= max(hits) < STEPS
        relation = "add up" if holds else "do NOT add up"
        return (
            holds,
            f"the counters {relation}: {completed} requests for {asked} steps in {batches} batches; "
            f"of {STEPS} steps, between {min(hits)} and {max(hits)} were left out for each worker",
        )


def paint(binary: str, scratch: Path, say: Say) -> Paintings:
    """Starts a broker and a worker for each stack, and has all of them paint at once."""
    checkpoint = write_checkpoint(scratch / "small.safetensors")
    names = sorted({name for stack in STACKS for name in stack})
    files = {name: write_lora(scratch / f"{name}.safetensors", seed) for seed, name in enumerate(names, 1)}
    say(f"{len(STACKS)} workers paint {STEPS} steps of {SIZE_PX} x {SIZE_PX}, each with adapters of its own")
    with contextlib.ExitStack() as cleanup:
        broker = cleanup.enter_context(BrokerProcess(binary, scratch / "paint.sock", ["--device", "cpu"]))
        crew = cleanup.enter_context(Crew(len(STACKS)))
        crew.wait_until_ready()
        crew.order("connect", lambda name: {"address": broker.address, "name": name})
        stacks = dict(zip(crew.names, STACKS, strict=True))
        order = {"prompt": PROMPT, "negative": NEGATIVE, "width": SIZE_PX, "height": SIZE_PX, "steps": STEPS}
        replies = crew.order(
            "paint",
            lambda name: {
                "checkpoint": str(checkpoint),
                "order": order
                | {"fb_cache": FB_CACHE, "loras": [(str(files[at]), s) for at, s in stacks[name].items()]},
                "output": str(scratch / f"{name}-painting.npy"),
            },
        )
        with luna_broker.connect(broker.address) as client:
            lanes = client.status()["lanes"]
        pixels = [np.load(scratch / f"{name}-painting.npy") for name in crew.names]
        lane = next(lane for lane in lanes if lane["service"] == "unet")
        return Paintings(crew.names, [_caption(stack) for stack in STACKS], pixels, replies, lane)


def table(paintings: Paintings) -> str:
    """What each worker asked for and got, and what the broker made of all."""
    lines = [f"{'worker':<10}{'adapters':<26}{'sampled in':>12}{'steps':>8}{'left out':>10}"]
    for name, caption, reply in zip(paintings.names, paintings.captions, paintings.replies, strict=True):
        lines.append(f"{name:<10}{caption:<26}{reply['sampling_s']:>10.1f} s{reply['steps']:>8}{reply['hits']:>10}")
    lane = paintings.lane
    lines.append(
        f"{lane['completed']} requests of UNets ran in {lane['batches']} batches; left out: by the block cache"
    )
    return "\n".join(lines)


def _caption(stack: dict[str, float]) -> str:
    return ", ".join(f"{name} {strength:g}" for name, strength in stack.items())
