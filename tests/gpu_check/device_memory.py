"""Bytes of the device that are taken, by whatever process; on the CPU the memory that processes are charged for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch

PAUSE_S = 0.002


def taken(place: str, processes: Iterable[int] = ()) -> int:
    """Of a GPU all that is taken, `processes` or not: not every driver gives an account of each process."""
    if place == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    return sum(proportional(process) for process in processes)


def proportional(process: int) -> int:
    """A page that several processes share counts for each by its share."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


class Peak:
    """The most that is taken at any moment of a block, as far as one sees who looks every two milliseconds."""

    def __init__(self, place: str, processes: Iterable[int] = ()) -> None:
        self._place, self._processes = place, list(processes)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.is_set():
            self._look()
            time.sleep(PAUSE_S)

    def _look(self) -> None:
        self.bytes = max(self.bytes, taken(self._place, self._processes))


class Ballast:
    """Takes so much of the GPU that a certain number of bytes is left, until it is dropped."""

    def __init__(self, place: str, leave: int) -> None:
        self._held = None
        if place == "cuda":
            # This process's own context counts neither before nor after.
            torch.zeros(1, device=place)
            free, _ = torch.cuda.mem_get_info()
            if free < leave:
                raise RuntimeError(f"{free / 1e9:.1f} GB of the GPU are free, {leave / 1e9:.0f} are wanted")
            self._held = torch.empty(free - leave, dtype=torch.uint8, device=place)
            self.left = torch.cuda.mem_get_info()[0]
        else:
            self.left = leave
