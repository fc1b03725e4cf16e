"""Requests together: what rows cost in one request, and what several clients at a time get from one UNet.

Prints a line for each part as soon as it knows.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import luna_broker
import torch
from hand_offs import said
from programs import Broker, tell
from sdxl_scene import ROWS, Given, Scene, arguments, distance, in_turn, milliseconds

REQUESTS = (1, 2, 4, 8)
CLIENTS = (1, 2, 4)
# Steps of each of the most clients after which a broker that finds out by itself has found out.
UNTIL_KNOWN = 40
WAYS = {"one at a time": ["--max-batch", "1"], "as many as the broker finds to pay": []}


@dataclass
class Sampler:
    """A client that asks for step after step."""

    unet: luna_broker.Unet
    given: Given
    alone: torch.Tensor
    times: list[float] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    worst: float = 0.0
    error: str = ""

    def sample(self, steps: int, start: threading.Barrier, place: str) -> None:
        # One's own, so that waiting for it waits for nobody else.
        stream = torch.cuda.Stream() if place == "cuda" else None
        with torch.cuda.stream(stream):
            try:
                start.wait(60)
                for _ in range(steps):
                    began = time.perf_counter()
                    out = self.unet(*self.given)
                    if stream:
                        stream.synchronize()
                    self.times.append(time.perf_counter() - began)
                    self.together.append(self.unet.last.step["together"])
                self.worst = distance(out, self.alone)
            except Exception as error:
                start.abort()
                self.error = said(error)


def rows_in_one(scene: Scene, unet: luna_broker.Unet, side: int) -> bool:
    ways = {requests: scene.given(ROWS * requests, side) for requests in REQUESTS}
    calls = {str(requests): lambda given=given: unet(*given) for requests, given in ways.items()}
    times = in_turn(calls, scene.place, max(3, scene.rounds // 2))
    one, good = milliseconds([done for _, done in times["1"]]), True
    for requests, given in ways.items():
        each = milliseconds([done / requests for _, done in times[str(requests)]])
        last = slice(ROWS * (requests - 1), None)
        off = distance(unet(*given)[last], unet(*(tensor[last] for tensor in given)))
        # Both are off what is exact by as much, each to its side.
        is_right = scene.is_right(off / 2)
        tell(
            table="rows in one request",
            latent=side,
            rows=ROWS * requests,
            ms_for_two=each,
            of_two_alone=round(each / one, 3),
            distance_to_alone=off,
            is_right=is_right,
        )
        good &= is_right
    return good


def at_once(scene: Scene, socket: str, count: int, side: int, steps: int) -> tuple[list[Sampler], float]:
    """So many clients, each with inputs of its own, and the seconds that all of their steps took."""
    samplers = []
    for seed in range(count):
        unet = luna_broker.connect(socket, timeout=120).unet(scene.unet)
        given = scene.given(side=side, seed=seed)
        samplers.append(Sampler(unet, given, unet(*given).clone()))
    if scene.place == "cuda":
        torch.cuda.synchronize()
    start = threading.Barrier(count + 1)
    threads = [threading.Thread(target=one.sample, args=(steps, start, scene.place)) for one in samplers]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        start.wait(60)
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return samplers, time.perf_counter() - began


def several_clients(scene: Scene, socket: str, way: str, side: int) -> bool:
    most, good = max(CLIENTS), True
    if not WAYS[way]:
        at_once(scene, socket, most, side, UNTIL_KNOWN if scene.place == "cuda" else 4)
    for count in CLIENTS:
        samplers, seconds = at_once(scene, socket, count, side, scene.rounds)
        errors = [one.error for one in samplers if one.error]
        if errors:
            tell(part=f"{count} clients, {way}", error=errors[0])
            return False
        worst = max(one.worst for one in samplers)
        is_right = scene.is_right(worst / 2)
        tell(
            table="clients at once",
            latent=side,
            broker_runs=way,
            clients=count,
            steps_per_s=round(count * scene.rounds / seconds, 2),
            ms_per_step_of_each=milliseconds([taken for one in samplers for taken in one.times]),
            together=round(statistics.mean(number for one in samplers for number in one.together), 2),
            distance_to_alone=worst,
            is_right=is_right,
        )
        good &= is_right
    return good


def main() -> int:
    scene = Scene(arguments(__doc__).parse_args())
    tell(part="weights", **scene.write_unet())
    sides, good = (scene.side // 2, scene.side), True
    for at, (way, options) in enumerate(WAYS.items()):
        options = ["--device", scene.place, *options, "-v"]
        with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder), *options) as broker:
            unet = luna_broker.connect(broker.socket, timeout=120).unet(scene.unet)
            for side in sides:
                if at == 0:
                    good &= rows_in_one(scene, unet, side)
                good &= several_clients(scene, broker.socket, way, side)
            lines = [line.partition("INFO")[2].strip() for line in broker.said().splitlines()]
            tell(part=way, found_by_the_broker=[line for line in lines if line.startswith("requests together")])
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
