"""Tables for a person; the same facts as JSON are the caller's."""

from __future__ import annotations

from collections.abc import Sequence

from .bars import BARS
from .figures import Figures, Key
from .names import NO_SIZE, REFERENCE, REFERENCE_ONE_CORE
from .sizes import LARGE, MIDDLE, SMALL

UNMEASURED = "not measured"


def text(result: dict, figures: Figures) -> str:
    """The whole report."""
    parts = [
        lines(result["machine"]),
        lines(result["settings"]),
        "\n".join(map(size_line, result["sizes"])),
    ]
    parts += [control_table(figures), hand_off_table(figures)]
    if result["bars"]:
        parts.append(bars_table(result["bars"]))
    sessions = {name: facts["session"] for name, facts in result["peers"].items() if "session" in facts}
    if sessions:
        parts.append(lines(sessions))
    if result["failures"]:
        parts.append("Failed, hence not measured:\n" + lines(result["failures"]))
    return "\n\n".join(parts)


def lines(facts: dict) -> str:
    return "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())


def size_line(size: dict) -> str:
    return f"{size['name']}: latent of {size['latent_bytes']:,} bytes, image of {size['image_bytes']:,} bytes"


def judge(figures: Figures) -> list[dict]:
    """One entry per bar; `holds` is None where a side is missing."""
    verdicts = []
    for bar in BARS:
        verdict = {
            "what": bar.what,
            "extra": bar.extra,
            "bar": f"{'≥' if bar.at_least else '≤'} {bar.limit:g}",
            "ratio": None,
            "baseline_us": figures.over_rounds(bar.baseline, bar.statistic) if bar.baseline in figures else None,
            "ours_us": figures.over_rounds(bar.ours, bar.statistic) if bar.ours in figures else None,
            "holds": None,
        }
        if bar.above in figures and bar.below in figures:
            verdict["ratio"] = bar.ratio(figures)
            verdict["holds"] = bar.holds(verdict["ratio"])
        verdicts.append(verdict)
    return verdicts


def bars_table(verdicts: list[dict]) -> str:
    rows = [("bar of the design", "×", "measured ×", "baseline µs", "ours µs", "")]
    for verdict in verdicts:
        word = {True: "holds", False: "DOES NOT HOLD", None: UNMEASURED}[verdict["holds"]]
        rows.append(
            (
                "  " * verdict["extra"] + verdict["what"],
                verdict["bar"],
                number(verdict["ratio"]),
                number(verdict["baseline_us"]),
                number(verdict["ours_us"]),
                word,
            )
        )
    return table(rows)


def control_table(figures: Figures) -> str:
    rows = [("control round trip", "p50 µs", "p99 µs")]
    for key in figures.keys():  # noqa: SIM118 (not a dict)
        if key[1] == NO_SIZE:
            rows.append((key[0], cell(figures, key, "p50_us"), cell(figures, key, "p99_us")))
    return table(rows)


def hand_off_table(figures: Figures) -> str:
    """p50 at every size, p99 at the middle one, and the ratios people ask for."""
    rows = [
        (
            "hand-off, p50 µs",
            SMALL,
            MIDDLE,
            LARGE,
            f"p99 at {MIDDLE}",
            "× reference",
            f"{LARGE} ÷ {SMALL}",
        )
    ]
    names = dict.fromkeys(name for name, size in figures.keys() if size != NO_SIZE)  # noqa: SIM118 (not a dict)
    for name in names:
        reference = REFERENCE_ONE_CORE if name.endswith("one core") else REFERENCE
        sizes = [cell(figures, (name, size), "p50_us") for size in (SMALL, MIDDLE, LARGE)]
        rows.append(
            (
                name,
                *sizes,
                cell(figures, (name, MIDDLE), "p99_us"),
                ratio_cell(figures, (name, MIDDLE), (reference, MIDDLE)),
                ratio_cell(figures, (name, LARGE), (name, SMALL)),
            )
        )
    return table(rows)


def ratio_cell(figures: Figures, above: Key, below: Key) -> str:
    return number(figures.p50_ratio(above, below)) if above in figures and below in figures else "-"


def cell(figures: Figures, key: Key, statistic: str) -> str:
    return number(figures.over_rounds(key, statistic)) if key in figures else "-"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, figures to the right, a closing word to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column == 0 or text[:1].isalpha() else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
