"""Proves the CUDA plane on a machine with an NVIDIA GPU, from what `make gpu-artifacts` built elsewhere.

python3 tests/gpu_check/main.py --artifacts target/gpu-artifacts --out benches/results

Needs Python 3.10 or newer with torch 2.11.0 and numpy; no Rust, no network. Results are written after every step; a
step that fails or takes too long does not keep the next from being run.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import machine
from manifest import Manifest
from programs import Deadline, NotAvailable
from record import Record
from report import SUBSTITUTE
from steps import GPU, NOTHING, STEPS, Bench, Step, Unfinished

LIMIT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--jobs", type=int, default=4, help="tests at a time, where times do not matter")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--substitute", action="store_true", help="a trial of the steps that do without a GPU")
    chosen = parser.parse_args()
    deadline = Deadline(chosen.limit)
    manifest = Manifest.read(chosen.artifacts)
    facts = machine.facts(Deadline(60, deadline))
    bench = Bench(manifest, Path(), not chosen.substitute, jobs(chosen.jobs, facts), facts["driver"].get("missing"))
    record = Record(chosen.out, name(bench, facts), head(manifest, facts))
    record.flush()
    with tempfile.TemporaryDirectory(prefix="luna-gpu-check-") as folder:
        bench.folder = Path(folder)
        for step in STEPS:
            if not chosen.only or step.name in chosen.only:
                play(step, bench, record, deadline)
    print("written:", *record.files)
    return int(any(step["outcome"] in ("failed", "not run") for step in record.content["steps"]))


def play(step: Step, bench: Bench, record: Record, deadline: Deadline) -> None:
    entry = record.begin({"name": step.name, "title": step.title, "limit_s": step.limit_s, "outcome": "begun"})
    began = time.monotonic()

    def tell(found: dict) -> None:
        entry["result"] = found
        record.flush()

    bench.tell = tell
    try:
        entry |= outcome(step, bench, Deadline(step.limit_s, deadline), deadline)
    except NotAvailable as error:
        entry |= {"outcome": "not available", "why": str(error)}
    except Unfinished as error:
        entry |= {"outcome": "failed", "why": str(error), "result": error.result}
    except Exception:
        # Whatever it is, the steps after this one have nothing to do with it.
        entry |= {"outcome": "failed", "why": traceback.format_exc(limit=-3)}
    entry["seconds"] = round(time.monotonic() - began, 1)
    record.flush()
    print(f"{entry['seconds']:7.1f} s  {entry['outcome']:13}  {step.title}", end="")
    print(f": {' '.join(entry['why'].split())[:300]}" if "why" in entry else "", flush=True)


def outcome(step: Step, bench: Bench, own: Deadline, whole: Deadline) -> dict:
    if whole.is_over():
        return {"outcome": "not run", "why": "the time for all steps was used up"}
    if bench.real and step.needs != NOTHING and bench.missing:
        raise NotAvailable(f"no driver: {bench.missing}")
    if not bench.real and step.needs == GPU:
        raise NotAvailable("the substitute driver cannot carry this")
    return {"outcome": "passed", "result": step.play(bench, own)}


def jobs(wanted: int, facts: dict) -> int:
    """Processes that share one context through MPS would die of each other's faults; some modes admit only one."""
    seen = facts["nvidia_smi"]
    modes = {gpu.get("compute_mode", "Default") for gpu in seen} if isinstance(seen, list) else set()
    return 1 if facts["mps"]["running"] or modes - {"Default"} else wanted


def name(bench: Bench, facts: dict) -> str:
    if not bench.real:
        return SUBSTITUTE
    found = facts["driver"].get("name", "no driver")
    return re.sub(r"[^a-z0-9]+", "-", found.lower()).strip("-")


def head(manifest: Manifest, facts: dict) -> dict:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "commit": manifest.commit,
        "files_changed_since_commit": manifest.changed,
        "began": now.isoformat(timespec="seconds"),
        "built": manifest.versions,
        "shim_bytes": manifest.shim["bytes"],
        "machine": facts,
    }


if __name__ == "__main__":
    sys.exit(main())
