"""The bars of the design: which row is held against which, and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .figures import Figures, Key
from .names import (
    FLOOR,
    LUNA,
    LUNA_INLINE,
    LUNA_ONE_COPY,
    LUNA_ONE_CORE,
    LUNA_PING,
    NO_SIZE,
    ONE_COPY,
    PICKLE,
    RAW,
    REFERENCE,
    REFERENCE_ONE_CORE,
    RUST,
    RUST_ONE_CORE,
    RUST_PING,
)
from .sizes import LARGE, MIDDLE, SMALL


@dataclass(frozen=True)
class Bar:
    """`above` ÷ `below` must stay on the right side of `limit`."""

    what: str
    above: Key
    below: Key
    limit: float
    statistic: str = "p50_us"
    at_least: bool = False
    ours_below: bool = False
    # Printed beside a bar of the design to explain it; `--strict` does not ask for it.
    extra: bool = False

    def ratio(self, figures: Figures) -> float:
        compare: Callable[[Key, Key], float] = figures.p50_ratio if self.statistic == "p50_us" else figures.p99_ratio
        return compare(self.above, self.below)

    def holds(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    @property
    def ours(self) -> Key:
        return self.below if self.ours_below else self.above

    @property
    def baseline(self) -> Key:
        return self.above if self.ours_below else self.below


def _control(name: str, row: str, limit: float, statistic: str) -> Bar:
    return Bar(
        f"control round trip, {name}, {statistic[:3]}",
        (row, NO_SIZE),
        (FLOOR, NO_SIZE),
        limit,
        statistic,
    )


BARS = (
    _control("Rust", RUST_PING, 1.5, "p50_us"),
    _control("Python", LUNA_PING, 2.0, "p50_us"),
    _control("Rust", RUST_PING, 3.0, "p99_us"),
    _control("Python", LUNA_PING, 3.0, "p99_us"),
    Bar("hand-off 12.6 MB in place, Python", (LUNA, MIDDLE), (REFERENCE, MIDDLE), 1.5),
    Bar("hand-off 12.6 MB in place, Rust", (RUST, MIDDLE), (REFERENCE, MIDDLE), 1.5),
    Bar(
        "the same, one core, Python",
        (LUNA_ONE_CORE, MIDDLE),
        (REFERENCE_ONE_CORE, MIDDLE),
        1.5,
        extra=True,
    ),
    Bar(
        "the same, one core, Rust",
        (RUST_ONE_CORE, MIDDLE),
        (REFERENCE_ONE_CORE, MIDDLE),
        1.5,
        extra=True,
    ),
    Bar(
        "hand-off against pickle over TCP",
        (PICKLE, MIDDLE),
        (LUNA, MIDDLE),
        800.0,
        at_least=True,
        ours_below=True,
    ),
    Bar("hand-off 100 MB ÷ 1 MB", (LUNA, LARGE), (LUNA, SMALL), 2.5),
    Bar("one unavoidable copy, 12.6 MB", (LUNA_ONE_COPY, MIDDLE), (ONE_COPY, MIDDLE), 1.15),
    Bar("inline rung, 12.6 MB", (LUNA_INLINE, MIDDLE), (RAW, MIDDLE), 1.1),
)
