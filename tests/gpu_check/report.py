"""A page to read, made of a run's JSON alone: `python tests/gpu_check/report.py gpu-NAME.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from suites import counted

# The name of a run without a driver of the machine's own.
SUBSTITUTE = "substitute"


def page(record: dict) -> str:
    lines = [f"# What `make gpu-check` found on {record['name']}", ""]
    lines += ["Made from the JSON beside it, which has everything. What is not here was not shown.", ""]
    if record["name"] == SUBSTITUTE:
        lines += [
            "**No GPU: the substitute driver.** This shows that the steps can be run; the figures mean nothing.",
            "",
        ]
    head = {key: value for key, value in record.items() if key not in ("name", "steps")}
    lines += [*_block(head), ""]
    lines += ["| step | outcome | seconds |", "| --- | --- | --: |"]
    lines += [f"| {step['title']} | {_outcome(step)} | {step.get('seconds', '')} |" for step in record["steps"]]
    for step in record["steps"]:
        said = _outcome(step)
        lines += ["", f"## {step['title']}", "", f"{said[0].upper()}{said[1:]}."]
        if step.get("result"):
            lines += ["", *_block(step["result"])]
    return "\n".join(lines) + "\n"


def _outcome(step: dict) -> str:
    why = step.get("why")
    return f"{step['outcome']}: {_cell(why)}" if why else step["outcome"]


def _block(found: dict) -> list[str]:
    """Plain values as a list; lists of like things as tables."""
    rest = {name: value for name, value in found.items() if name != "counts"}
    lines = [f"- {counted(found['counts'])}"] if "counts" in found else []
    plain = {name: value for name, value in flat(rest).items() if not isinstance(value, list)}
    lines += [f"- {name}: {_cell(value)}" for name, value in plain.items() if value is not None]
    for name, value in found.items():
        lines += _lists(name, value)
    return lines


def _lists(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        nested = [_lists(f"{name}, {key}", inner) for key, inner in value.items()]
        return [line for lines in nested for line in lines]
    if not isinstance(value, list) or not value:
        return []
    if all(isinstance(one, dict) for one in value):
        return ["", f"{name}:", "", *_table([flat(one) for one in value])]
    return ["", f"{name}:", "", *[f"- {_cell(one)}" for one in value]]


def _table(rows: list[dict]) -> list[str]:
    """One table for each set of columns, in the order in which they come."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    lines: list[str] = []
    for columns, alike in kinds.items():
        lines += [""] if lines else []
        lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in alike]
    return lines


def flat(found: dict) -> dict:
    """`{"a": {"b": 1}}` as `{"a, b": 1}`."""
    result: dict = {}
    for name, value in found.items():
        if isinstance(value, dict):
            result |= {f"{name}, {inner}": one for inner, one in flat(value).items()}
        else:
            result[name] = value
    return result


def _cell(value: object) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".md").write_text(page(json.loads(source.read_text())))
