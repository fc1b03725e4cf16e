#!/usr/bin/env python3
"""Measures luna-broker and its baselines side by side, and holds the ratios against the design's bars."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from harness import machine, report
from harness.line_up import LineUp
from harness.plan import Plan, choose_sizes
from harness.rounds import Rounds
from harness.units import Limits

FULL = Limits(rounds=15, seconds=0.15)
QUICK = Limits(
    rounds=5,
    seconds=0.06,
    iterations=1000,
    warm_up=100,
    control_iterations=5000,
    control_warm_up=500,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--broker",
        default=os.environ.get("LUNA_BROKER_BIN"),
        metavar="PATH",
        help="the luna-broker binary (default: $LUNA_BROKER_BIN)",
    )
    parser.add_argument("--baselines-only", action="store_true", help="measure the baselines without a broker")
    parser.add_argument("--quick", action="store_true", help="under a minute, without byte movers at 100 MB")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds to take medians over")
    parser.add_argument(
        "--latents",
        choices=("auto", "fixed", "growing"),
        default="auto",
        help="131,072 bytes at every image size, or growing with the image (auto: fixed where the broker can)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here as well")
    parser.add_argument("--strict", action="store_true", help="exit 1 unless every bar was measured and holds")
    chosen = parser.parse_args()
    if not chosen.baselines_only and chosen.broker is None:
        parser.error("name the broker with --broker or $LUNA_BROKER_BIN, or ask for --baselines-only")
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    return chosen


def main() -> int:
    chosen = arguments()
    limits = QUICK if chosen.quick else FULL
    if chosen.rounds is not None:
        limits = Limits(**(vars(limits) | {"rounds": chosen.rounds}))
    core = max(os.sched_getaffinity(0))
    began, watch = time.monotonic(), machine.LoadWatch()

    with tempfile.TemporaryDirectory(prefix="luna-bench-") as folder:
        broker = None if chosen.baselines_only else str(Path(chosen.broker).resolve())
        with LineUp(Path(folder), broker) as line_up:
            sizes = choose_sizes(chosen.latents, line_up)
            rounds = Rounds(Plan(line_up, sizes, core, movers_at_large=not chosen.quick).groups)
            rounds.verify()
            rounds.measure(limits, lambda number: progress(number, limits.rounds))
            peers = {name: peer.facts for name, peer in line_up.peers.items()}

    verdicts = [] if chosen.baselines_only else report.judge(rounds.figures)
    result = {
        "machine": machine.facts() | watch.facts(),
        "settings": vars(limits) | {"core": core, "seconds_taken": round(time.monotonic() - began, 1)},
        "sizes": [
            size.as_json() | {"latent_bytes": size.latent_bytes, "image_bytes": size.image_bytes} for size in sizes
        ],
        "bars": verdicts,
        "figures": rounds.figures.as_json(),
        "peers": peers,
        "proofs": rounds.proofs,
        "failures": line_up.failures | rounds.failures,
    }
    print(report.text(result, rounds.figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    unmet = [verdict for verdict in verdicts if not verdict["holds"] and not verdict["extra"]]
    return 1 if chosen.strict and (unmet or result["failures"]) else 0


def progress(number: int, rounds: int) -> None:
    print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
