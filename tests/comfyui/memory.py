"""What processes cost in memory, shared pages counted once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

MIB = 1 << 20


def pss_bytes(pid: int) -> int:
    """Of each page, the process's share: its size by the number of processes that have it."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, f"the system does not say what process {pid} costs"
    return int(found[1]) * 1024


def total_mib(pids: Iterable[int]) -> int:
    """Of all of them together, every page once."""
    return round(sum(pss_bytes(pid) for pid in pids) / MIB)


def table(heading: str, rows: dict[str, list[int]]) -> str:
    """One row for each way of working, one column for each number of workers."""
    columns = max(len(row) for row in rows.values())
    lines = [f"{heading:<36}" + "".join(f"{f'{count} workers':>11}" for count in range(1, columns + 1))]
    for name, row in rows.items():
        lines.append(f"{name:<36}" + "".join(f"{mib:>11}" for mib in row))
    return "\n".join(lines)
