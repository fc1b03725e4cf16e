#!/usr/bin/env python3
"""Measures what one to four workers with a UNet of Stable Diffusion 1.5's size take in memory and time: each with
weights of its own, and all with the broker's."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness import machine
from harness.programs import PeerProcess, ProgramFailed, Server

REPOSITORY = Path(__file__).resolve().parent.parent
MODES = ("private", "attached")
WORKERS = 4
# Of libraries and activations in one worker, and what the machine keeps besides.
WORKER_BYTES, SPARE_BYTES = 700_000_000, 1_500_000_000
# DESIGN's bars: an idle worker and this part of the weights; and how soon a later worker has them.
BAR_OF_WEIGHTS, BAR_SECONDS = 0.05, 0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--broker",
        default=os.environ.get("LUNA_BROKER_BIN"),
        metavar="PATH",
        help="the luna-broker binary (default: $LUNA_BROKER_BIN)",
    )
    parser.add_argument("--quick", action="store_true", help="a UNet shrunk to a fiftieth, in a minute")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help="most workers at a time")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="what workers compute in; the file is float16",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here as well")
    parser.add_argument("--strict", action="store_true", help="exit 1 unless every bar was measured and holds")
    chosen = parser.parse_args()
    if chosen.broker is None:
        parser.error("name the broker with --broker or $LUNA_BROKER_BIN")
    if chosen.workers < 1:
        parser.error("--workers must be at least 1")
    return chosen


def main() -> int:
    chosen = arguments()
    watch = machine.LoadWatch()
    path = REPOSITORY / "target" / "bench" / f"unet-{'quick' if chosen.quick else 'full'}-float16.safetensors"
    with tempfile.TemporaryDirectory(prefix="luna-bench-") as name:
        folder = Path(name)
        try:
            if not path.exists():
                say(f"writing {path}")
                with Worker("writer", folder) as writer:
                    writer.ask("write", path=str(path), quick=chosen.quick)
            runs = {mode: measure(mode, path, folder, chosen) for mode in MODES}
        except ProgramFailed as failure:
            print(failure, file=sys.stderr)
            return 2
    result = {
        "machine": machine.facts() | watch.facts(),
        "settings": {"dtype": chosen.dtype, "quick": chosen.quick, "file_bytes": path.stat().st_size},
        "runs": runs,
        "bars": bars(runs, chosen.quick),
    }
    print(text(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if chosen.strict and not all(result["bars"].values()) else 0


class Worker(PeerProcess):
    """One worker process, as a context manager."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__("harness.attach_worker", [], folder / f"{name}.log")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(mode: str, path: Path, folder: Path, chosen: argparse.Namespace) -> list[dict]:
    """One more worker after the other; each entry is with all of them there."""
    entries: list[dict] = []
    with ExitStack() as stack:
        address, pids = None, []
        if mode == "attached":
            address = folder / "attach.sock"
            command = [str(Path(chosen.broker).resolve()), "serve", "--socket", str(address)]
            server = Server(command, address, folder / "broker.log")
            stack.callback(server.close)
            server.wait_for_socket()
            pids.append(server.pid)
        for number in range(1, chosen.workers + 1):
            say(f"{mode}: {number} of {chosen.workers}")
            lacking = memory_lacking(mode, number, path.stat().st_size, chosen.dtype)
            if lacking:
                entries.append({"workers": number, "skipped": lacking})
                break
            before = sum(map(pss_bytes, pids))
            worker = stack.enter_context(Worker(f"{mode}-{number}", folder))
            worker.ask("ready", address=None if address is None else str(address))
            idle = sum(map(pss_bytes, [*pids, worker.pid])) - before
            loaded = worker.ask(f"load_{mode}", path=str(path), quick=chosen.quick, dtype=chosen.dtype)
            ran = worker.ask("forward")
            pids.append(worker.pid)
            total = sum(map(pss_bytes, pids))
            facts = {"workers": number, "pss_bytes": total, "added_bytes": total - before, "idle_bytes": idle}
            entries.append(facts | loaded | ran)
    return entries


def pss_bytes(pid: int) -> int:
    """Memory of a process, where a page that several share counts in parts: sums are what processes take together."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ProgramFailed(f"/proc/{pid}/smaps_rollup tells no PSS")


def memory_lacking(mode: str, number: int, file_bytes: int, dtype: str) -> str | None:
    """Why one more worker would not fit, if so."""
    weights = file_bytes * (2 if dtype == "float32" else 1)
    needed = WORKER_BYTES + SPARE_BYTES + (weights if mode == "private" or number == 1 else 0)
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:")
    if available >= needed:
        return None
    return f"{available / 1e9:.1f} GB are available; one more worker needs {needed / 1e9:.1f}"


def bars(runs: dict[str, list[dict]], quick: bool) -> dict[str, bool]:
    measured = {mode: [entry for entry in runs[mode] if "skipped" not in entry] for mode in MODES}
    later = measured["attached"][1:]
    outputs = {entry["output"] for mode in MODES for entry in measured[mode]}
    verdicts = {"all outputs are equal, bit for bit": len(outputs) == 1}
    if later:
        weights = later[0]["weight_bytes"]
        allowed = BAR_OF_WEIGHTS * weights
        growth = f"workers 2…{later[-1]['workers']} add an idle worker and at most 5 % of the weights"
        # Beside shrunken weights, the activations of a forward are many times this.
        if not quick:
            verdicts[growth] = all(entry["added_bytes"] - entry["idle_bytes"] <= allowed for entry in later)
        verdicts["they have the weights in under 0.5 s"] = all(entry["load_s"] < BAR_SECONDS for entry in later)
    return verdicts


def text(result: dict) -> str:
    settings = result["settings"]
    head = f"UNet file of {settings['file_bytes'] / 1e9:.2f} GB in float16, computed in {settings['dtype']}"
    lines = [head, ""]
    columns = ("", "workers", "Σ PSS GB", "added MB", "of it idle MB", "weights s", "first forward s", "warm s")
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for mode, entries in result["runs"].items():
        for entry in entries:
            if "skipped" in entry:
                lines.append(f"| {mode} | {entry['workers']} | not measured: {entry['skipped']} |" + " |" * 5)
                continue
            cells = (
                mode,
                str(entry["workers"]),
                f"{entry['pss_bytes'] / 1e9:.2f}",
                f"{entry['added_bytes'] / 1e6:.0f}",
                f"{entry['idle_bytes'] / 1e6:.0f}",
                f"{entry['load_s']:.3f}",
                f"{entry['first_forward_s']:.2f}",
                f"{entry['forward_s']:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    attached = [entry for entry in result["runs"]["attached"] if "skipped" not in entry]
    lines += ["", "Attaching, of it `client.attach` and `load_attached`:"]
    lines += [
        f"worker {entry['workers']}: {entry['attach_s']:.3f} s and {entry['load_attached_s']:.3f} s"
        + (" (the broker loads the file)" if entry["workers"] == 1 else "")
        for entry in attached
    ]
    lines.append("")
    lines += [f"{what}: {'holds' if held else 'DOES NOT HOLD'}" for what, held in result["bars"].items()]
    busy = result["machine"]["cores_busy_with_other_work"]
    lines += [f"cores busy with other work meanwhile: {busy}"]
    return "\n".join(lines)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
