"""Runs tests of a prebuilt test program one by one, so that one that hangs or crashes takes no other with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from programs import Deadline, End, run

# What the harness itself prints.
_HARNESS = re.compile(r"running \d+ tests?|test result: .*|ok|FAILED|")
_TITLE = re.compile(r"^test \S+ \.\.\. ?")
_FACT = "FACT "
_SKIPPED = "skipped"
# Per test; the slowest that pass take a few seconds.
PATIENCE_S = 60


def names(program: Path, part: str, deadline: Deadline, environment: dict[str, str]) -> list[str]:
    """Tests whose name contains `part`."""
    end = run([program, "--list", "--format", "terse"], deadline, environment)
    if end.code != 0:
        raise RuntimeError(f"{program.name} does not list its tests: {end.tail(400)}")
    found = [line.removesuffix(": test") for line in end.out.splitlines() if line.endswith(": test")]
    return [name for name in found if part in name]


def verdict(name: str, end: End) -> dict:
    """What one test said, sorted: numbers, reasons why something was left out, and what went wrong."""
    lines = end.errors.splitlines()
    said = {"test": name, "outcome": end.outcome, "seconds": end.seconds}
    facts = [json.loads(line.removeprefix(_FACT)) for line in lines if line.startswith(_FACT)]
    skipped = [line for line in lines if line.startswith(_SKIPPED)]
    out = [_TITLE.sub("", line) for line in end.out.splitlines()]
    printed = [line for line in out if not _HARNESS.fullmatch(line)]
    if end.outcome == "passed" and re.search(r"test result: ok\. 0 passed", end.out):
        said |= {"outcome": "failed", "said": "there is no test of this name"}
    elif end.outcome == "passed" and skipped:
        # A part may have been tested all the same, which is not counted.
        said |= {"outcome": "skipped", "why": skipped}
    elif end.outcome != "passed":
        said["said"] = end.tail()
    return said | ({"facts": facts} if facts else {}) | ({"printed": printed} if printed else {})


def play(
    program: Path,
    tests: list[str],
    deadline: Deadline,
    environment: dict[str, str],
    jobs: int = 1,
    tell: Callable[[dict], None] = lambda _: None,
) -> dict:
    """All of them, `jobs` at a time; `tell` gets the sum after each."""
    done: list[dict] = []

    def one(name: str) -> None:
        if deadline.is_over():
            done.append({"test": name, "outcome": "not run"})
            return
        command = [program, name, "--exact", "--nocapture"]
        done.append(verdict(name, run(command, Deadline(PATIENCE_S, deadline), environment)))
        tell(total(done))

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(one, tests))
    return total(done)


def total(done: list[dict]) -> dict:
    """Counts, then what a reader has to see: everything but the plain passes."""
    counts = {"passed": 0, "failed": 0, "timed out": 0, "skipped": 0, "not run": 0}
    for one in done:
        counts[one["outcome"]] += 1
    ordered = sorted(done, key=lambda one: one["test"])
    found = {"counts": counts}
    not_passed = [{key: one[key] for key in ("test", "outcome", "said") if key in one} for one in ordered]
    found["not_passed"] = [one for one in not_passed if one["outcome"] not in ("passed", "skipped")]
    found["skipped"] = [{"test": one["test"], "why": one["why"]} for one in ordered if one["outcome"] == "skipped"]
    found["facts"] = {}
    for fact in [fact for one in ordered for fact in one.get("facts", [])]:
        found["facts"].setdefault(fact["fact"], []).append(fact["found"])
    found["printed"] = {one["test"]: one["printed"] for one in ordered if one.get("printed")}
    return {key: value for key, value in found.items() if value or key == "counts"}


def is_good(result: dict) -> bool:
    counts = result["counts"]
    return counts["passed"] > 0 and not any(counts[bad] for bad in ("failed", "timed out", "not run"))


def counted(counts: dict) -> str:
    """`61 passed, 2 skipped`."""
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def replayed(end: End) -> dict:
    """What the table of rules said of itself on this driver."""
    lines = end.out.splitlines()
    told = [_TITLE.sub("", line) for line in lines]
    agrees = [line.removeprefix("AGREES ") for line in told if line.startswith("AGREES ")]
    disagrees = [line.removeprefix("DISAGREES ") for line in told if line.startswith("DISAGREES ")]
    found = {"agrees": len(agrees), "disagrees": len(disagrees), "disagreements": disagrees}
    if end.code != 0:
        found |= {"ended": end.outcome, "said": end.tail()}
    return found
