"""How many workers with SDXL's UNet fit into 32 GB of a GPU and sample at 1024 x 1024 pixels, all at once.

The rest of the GPU is taken away first, and the broker's share comes out of the 32 GB too. Workers are added one by one
until one fails for want of memory, or twelve run. They hold a UNet and no text encoders or VAE. Prints a line for each
part as soon as it knows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from device_memory import Ballast, taken
from programs import Broker, Deadline, python, tell
from sdxl_scene import TOLERANCE, Scene, arguments, distance
from sdxl_worker import ATTACHED, PRIVATE, REMOTE, STEPS

# Decimal, which is the less: cards that are sold with 32 GB have some more.
LEAVE = 32_000_000_000
MOST = {"cuda": 12, "cpu": 2}
# Bytes that may be taken beside the ballast where nothing runs.
SETTLED = 64_000_000


class Process:
    """A worker from outside."""

    def __init__(self, scene: Scene, kind: str, number: int, socket: str) -> None:
        self.result = scene.folder / f"sdxl-result-{number}"
        command = [python(), str(Path(__file__).with_name("sdxl_worker.py")), "--broker", str(scene.broker)]
        command += ["--place", scene.place, "--size", scene.size, "--folder", str(scene.folder), "--kind", kind]
        command += ["--socket", socket, "--result", str(self.result)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def begin(self, what: str) -> None:
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which is what is heard of it

    def hear(self) -> dict:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"it ended with {self._process.wait()}", "is_no_memory": False}

    def ask(self, what: str) -> dict:
        self.begin(what)
        return self.hear()

    def output(self) -> torch.Tensor:
        return torch.from_numpy(numpy.fromfile(self.result, dtype=numpy.float32))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Series:
    """What came of adding workers of one kind."""

    kind: str
    fit: int = 0
    bytes: int = 0
    first: torch.Tensor | None = None
    stopped_by: str = "as many as were tried"
    is_right: bool = True

    def stop(self, found: dict) -> Series:
        self.stopped_by = found["error"]
        # Whatever else it was, it says nothing of how many fit.
        self.is_right &= found["is_no_memory"]
        return self


def grow(series: Series, workers: Iterable[Process], used: Callable[[], int], most_off: float) -> Series:
    running: list[Process] = []
    for worker in workers:
        loaded = worker.ask("load")
        if "error" in loaded:
            return series.stop(loaded)
        running.append(worker)
        began = time.perf_counter()
        for one in running:
            one.begin("run")
        found = [one.hear() for one in running]
        seconds = time.perf_counter() - began
        errors = [one for one in found if "error" in one]
        if errors:
            return series.stop(min(errors, key=lambda one: one["is_no_memory"]))
        outputs = [one.output() for one in running]
        series.first = outputs[0] if series.first is None else series.first
        worst = max(distance(output, series.first) for output in outputs)
        now = used()
        tell(
            table="workers",
            kind=series.kind,
            workers=len(running),
            GB=round(now / 1e9, 3),
            added_GB=round((now - series.bytes) / 1e9, 3),
            seconds_to_load=loaded["seconds"],
            ms_per_step_of_each=round(statistics.median(sum((one["seconds"] for one in found), [])) * 1e3, 1),
            steps_per_s=round(STEPS * len(running) / seconds, 2),
            distance_to_the_first=worst,
        )
        series.is_right &= worst <= most_off
        series.fit, series.bytes = len(running), now
    return series


def series(scene: Scene, kind: str, most: int, before: int, most_off: float) -> Series:
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        broker = Broker(scene.broker, folder, "--device", scene.place)
        # They need a while until they are ready for their first line.
        workers = [Process(scene, kind, number, broker.socket) for number in range(most)]
        for worker in workers:
            ends.callback(worker.end)
        processes = [worker.pid for worker in workers]
        if kind != PRIVATE:
            ends.enter_context(broker)
            processes.append(broker.process.pid)
        unready = [found for found in (worker.hear() for worker in workers) if "error" in found]
        if unready:
            return Series(kind).stop(unready[0])
        return grow(Series(kind), workers, lambda: taken(scene.place, processes) - before, most_off)


def settled(place: str, before: int) -> int:
    """What is taken beside the ballast once the processes that are gone have given back what they had."""
    limit = Deadline(10)
    while taken(place) - before > SETTLED and not limit.is_over():
        time.sleep(0.1)
    return taken(place) - before


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--most", type=int)
    chosen = parser.parse_args()
    scene = Scene(chosen)
    tell(part="weights", **scene.write_unet())
    ballast = Ballast(scene.place, LEAVE)
    before, done = taken(scene.place), []
    # Each may be off by as much, to either side.
    most_off = 2 * TOLERANCE[scene.place]
    for kind in (ATTACHED, REMOTE, PRIVATE):
        tell(part=kind, bytes_left=ballast.left, bytes_taken_before=settled(scene.place, before))
        one = series(scene, kind, chosen.most or MOST[scene.place], before, most_off)
        off = distance(one.first, done[0].first) if one.fit and done and done[0].fit else 0.0
        one.is_right &= off <= most_off and one.fit > 0
        tell(
            table="workers that fit into 32 GB and run",
            kind=kind,
            workers=one.fit,
            GB=round(one.bytes / 1e9, 3),
            distance_to_attached=off,
            is_right=one.is_right,
            stopped_by=one.stopped_by,
        )
        done.append(one)
    return int(not all(one.is_right for one in done))


if __name__ == "__main__":
    sys.exit(main())
