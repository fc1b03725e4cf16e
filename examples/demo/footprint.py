"""What four workers cost in memory, with and without a broker between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broker_process import BrokerProcess
from crew import Crew

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Footprint:
    """Sums over all processes of one way of working, in bytes of PSS.

    PSS counts a page shared by n processes as 1/n in each, so that the sum over processes is the
    memory they take together.
    """

    label: str
    idle_worker: int
    idle: int
    loaded: int

    @property
    def added(self) -> int:
        return self.loaded - self.idle


def can_measure() -> bool:
    """Whether this system tells the PSS of a process."""
    return Path("/proc/self/smaps_rollup").exists()


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no line that starts with 'Pss:'")


def measure_alone(crew: Crew, vae: Path) -> Footprint:
    """Every worker loads the file itself."""
    idle = _total(crew.pids)
    crew.order("load_alone", lambda _: {"path": str(vae)})
    label = "each worker loads it"
    return Footprint(label, idle // len(crew.pids), idle, _total(crew.pids))


def measure_shared(crew: Crew, broker: BrokerProcess, vae: Path) -> Footprint:
    """The broker loads the file, every worker uses it there."""
    crew.order("connect", lambda name: {"address": broker.address, "name": name})
    idle_workers = _total(crew.pids)
    idle = idle_workers + _total([broker.pid])
    crew.order("load_shared", lambda _: {"path": str(vae)})
    label = "broker holds it for all"
    everyone = [*crew.pids, broker.pid]
    return Footprint(label, idle_workers // len(crew.pids), idle, _total(everyone))


def table(footprints: Iterable[Footprint], weight_bytes: int) -> str:
    """The comparison as text, in MB (10^6 bytes)."""
    lines = [(f"{'':<26}{'one idle worker':>16}{'all idle':>12}{'all loaded':>12}{'added':>10}{'x weights':>12}")]
    for footprint in footprints:
        lines.append(
            f"{footprint.label:<26}"
            f"{_megabytes(footprint.idle_worker):>16}"
            f"{_megabytes(footprint.idle):>12}"
            f"{_megabytes(footprint.loaded):>12}"
            f"{_megabytes(footprint.added):>10}"
            f"{footprint.added / weight_bytes:>12.2f}"
        )
    return "\n".join(lines)


def _total(pids: Iterable[int]) -> int:
    return sum(pss_bytes(pid) for pid in pids)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / MEGABYTE:,.0f} MB"
