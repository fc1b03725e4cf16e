"""Every measurement of a run, and the two ways of taking a ratio."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from .names import IN_ORDER

# (row name, size name); the control round trip has no size.
Key = tuple[str, str]


class Figures:
    def __init__(self) -> None:
        self._rounds: dict[Key, dict[int, dict]] = defaultdict(dict)

    def add(self, key: Key, round_number: int, measured: dict) -> None:
        self._rounds[key][round_number] = measured

    def drop(self, key: Key) -> None:
        """A row that failed once proves nothing with its other rounds."""
        self._rounds.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._rounds

    def keys(self) -> list[Key]:
        return sorted(self._rounds, key=lambda key: IN_ORDER.index(key[0]))

    def over_rounds(self, key: Key, statistic: str) -> float:
        return median(measured[statistic] for measured in self._rounds[key].values())

    def p50_ratio(self, above: Key, below: Key) -> float:
        """Each round against its own baseline: what slows a whole round down cancels out."""
        shared = self._rounds[above].keys() & self._rounds[below].keys()
        return median(self._rounds[above][r]["p50_us"] / self._rounds[below][r]["p50_us"] for r in shared)

    def p99_ratio(self, above: Key, below: Key) -> float:
        """Medians first: the p99 of one round is a single accident of scheduling."""
        return self.over_rounds(above, "p99_us") / self.over_rounds(below, "p99_us")

    def as_json(self) -> list[dict]:
        return [
            {
                "row": row,
                "size": size,
                "p50_us": self.over_rounds((row, size), "p50_us"),
                "p99_us": self.over_rounds((row, size), "p99_us"),
                "rounds": [measured for _, measured in sorted(rounds.items())],
            }
            for (row, size), rounds in self._rounds.items()
        ]
