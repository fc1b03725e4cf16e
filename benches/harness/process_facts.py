"""What Linux says about a process: faults, mappings, threads, descriptors, wake-ups, allocations, system calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ATTACH_SECONDS = 10.0


@dataclass(frozen=True)
class ProcessFacts:
    """Faults and wake-ups count up over the life of the process's threads; the rest is what exists now."""

    minor_faults: int
    major_faults: int
    mappings: int
    threads: int
    descriptors: int
    wake_ups: int

    @classmethod
    def of(cls, pid: int) -> ProcessFacts:
        root = Path(f"/proc/{pid}")
        # The program's name may hold spaces and brackets; the fields after the last bracket do not.
        fields = root.joinpath("stat").read_text().rpartition(")")[2].split()
        return cls(
            minor_faults=int(fields[7]),
            major_faults=int(fields[9]),
            mappings=len(root.joinpath("maps").read_text().splitlines()),
            threads=len(os.listdir(root / "task")),
            descriptors=len(os.listdir(root / "fd")),
            wake_ups=sum(voluntary_switches(status) for status in root.glob("task/*/status")),
        )

    def since(self, before: ProcessFacts) -> dict[str, int]:
        earlier = asdict(before)
        return {name: value - earlier[name] for name, value in asdict(self).items()}


def voluntary_switches(status: Path) -> int:
    """How often a thread went to sleep; it was woken as often, but for the last time."""
    try:
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status.read_text(), re.MULTILINE)
    except FileNotFoundError:  # The thread ended meanwhile.
        return 0
    return int(found[1]) if found else 0


class Allocations:
    """Counts what a program started with `environment` allocates. Python's own small objects are not among it."""

    def __init__(self, library: Path, counter: Path) -> None:
        self.environment = {"LD_PRELOAD": str(library), "LUNA_BENCH_ALLOCATIONS": str(counter)}
        self._counter = counter

    def count(self) -> int:
        return struct.unpack("=Q", self._counter.read_bytes())[0]


class NotTraced(RuntimeError):
    """System calls could not be counted; the message says why."""


class SystemCalls:
    """Counts the system calls of one process and its threads between entering and leaving the `with` block."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.counts: dict[str, int] = {}
        self._pid = pid
        self._summary = folder / f"strace-{pid}"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> SystemCalls:
        strace = shutil.which("strace")
        if strace is None:
            raise NotTraced("strace is not installed")
        self._process = subprocess.Popen(
            [strace, "-c", "-f", "-p", str(self._pid), "-o", str(self._summary)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + ATTACH_SECONDS
        while not self._attached_everywhere():
            if self._process.poll() is not None:
                raise NotTraced(self._process.stderr.read().strip())
            if time.monotonic() > until:
                self._end()
                raise NotTraced(f"strace did not attach within {ATTACH_SECONDS:.0f} s")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        # time, seconds, µs per call, calls, errors (often empty), name
        for line in self._summary.read_text().splitlines():
            found = re.fullmatch(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)", line)
            if found and found[2] != "total":
                self.counts[found[2]] = int(found[1])

    def _end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=ATTACH_SECONDS)
        self._process.stderr.close()

    def _attached_everywhere(self) -> bool:
        for status in Path(f"/proc/{self._pid}/task").glob("*/status"):
            tracer = re.search(r"^TracerPid:\s*(\d+)", status.read_text(), re.MULTILINE)
            if tracer is None or tracer[1] == "0":
                return False
        return True
