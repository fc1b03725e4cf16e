#!/usr/bin/env python3
"""Counts what one hand-off costs once all is warm, beside the plain-Python client of a C server in the same run:
system calls, wake-ups, allocations, page faults, mappings."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from harness.process_facts import Allocations, NotTraced, ProcessFacts, SystemCalls
from harness.programs import PeerProcess, ProgramFailed, Server, build
from harness.report import table
from harness.sizes import GROWING_LATENT, MIDDLE

# Python allocates a little whatever it is asked to do; a page per request would be fifty times this.
FAULTS_THAT_COUNT_AS_NONE = 20
OURS, REFERENCE = "luna-broker", "Python on C server"
ROLES = ("server", "client")
PER_CALL = ("wake_ups", "allocations")
SIZE = next(size for size in GROWING_LATENT if size.name == MIDDLE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--broker",
        default=os.environ.get("LUNA_BROKER_BIN"),
        metavar="PATH",
        help="the luna-broker binary (default: $LUNA_BROKER_BIN)",
    )
    parser.add_argument("--requests", type=int, default=1000, metavar="N")
    parser.add_argument("--warm-up", type=int, default=200, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count here as well")
    chosen = parser.parse_args()
    if chosen.broker is None:
        parser.error("name the broker with --broker or $LUNA_BROKER_BIN")
    if chosen.requests < 1:
        parser.error("--requests must be at least 1")
    return chosen


class Pair:
    """A server and its client, each with its allocations counted."""

    def __init__(self, name: str, command: list[str], module: str, folder: Path, library: Path) -> None:
        self.name = name
        self._counted = {role: Allocations(library, folder / f"{name}-{role}-allocations") for role in ROLES}
        path = folder / f"{name}.socket"
        self._server = Server(
            [*command, str(path)], path, folder / f"{name}-server.log", self._counted["server"].environment
        )
        self._client: PeerProcess | None = None
        try:
            self._client = PeerProcess(
                module, [str(path)], folder / f"{name}-client.log", self._counted["client"].environment
            )
            self._server.wait_for_socket()
            self.opened = self._client.ask("open")
        except BaseException:
            # Nobody else knows of them yet.
            self.close()
            raise
        self.pids = {"server": self._server.pid, "client": self._client.pid}

    def decode(self, times: int) -> None:
        self._client.ask("repeat", variant="in place", size=SIZE.as_json(), count=times)

    def changes(self, requests: int) -> dict[str, dict[str, int]]:
        """What `requests` decodes change, by role."""
        facts = {role: ProcessFacts.of(pid) for role, pid in self.pids.items()}
        allocations = {role: counted.count() for role, counted in self._counted.items()}
        self.decode(requests)
        return {
            role: ProcessFacts.of(pid).since(facts[role])
            | {"allocations": self._counted[role].count() - allocations[role]}
            for role, pid in self.pids.items()
        }

    def system_calls(self, requests: int, folder: Path) -> dict[str, dict]:
        """Tracing slows every call down and makes pages of its own, so it has a run to itself."""
        calls: dict[str, dict] = {}
        for role, pid in self.pids.items():
            try:
                with SystemCalls(pid, folder) as traced:
                    self.decode(requests)
                calls[role] = traced.counts
            except NotTraced as reason:
                calls[role] = {"skipped": str(reason)}
        return calls

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._server.close()


def main() -> int:
    chosen = arguments()
    with tempfile.TemporaryDirectory(prefix="luna-bench-") as name:
        folder = Path(name)
        broker = [str(Path(chosen.broker).resolve()), "serve", "--bench-models", "--socket"]
        try:
            library = build("allocations.c", folder, "harness", ("-shared", "-fPIC"))
            result = {"requests": chosen.requests, "pairs": {}}
            for pair in (
                (OURS, broker, "harness.luna_client"),
                (REFERENCE, [str(build("hand_off.c", folder))], "baseline.shared_client"),
            ):
                result["pairs"][pair[0]] = measured(Pair(*pair, folder, library), folder, chosen)
        except ProgramFailed as failure:
            print(failure, file=sys.stderr)
            return 2

    result["verdicts"] = verdicts(result["pairs"][OURS]["changes"], chosen.requests)
    print(text(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(result["verdicts"].values()) else 1


def measured(pair: Pair, folder: Path, chosen: argparse.Namespace) -> dict:
    try:
        pair.decode(chosen.warm_up)
        changes = pair.changes(chosen.requests)
        return {
            "session": pair.opened.get("session"),
            "changes": changes,
            "system_calls": pair.system_calls(chosen.requests, folder),
        }
    finally:
        pair.close()


def verdicts(changes: dict[str, dict[str, int]], requests: int) -> dict[str, bool]:
    most = FAULTS_THAT_COUNT_AS_NONE * max(1, requests / 1000)
    return {
        "no new mapping in broker or client": all(change["mappings"] <= 0 for change in changes.values()),
        "no page fault in the broker": faults(changes["server"]) < most,
        "no page fault in the client": faults(changes["client"]) < most,
    }


def faults(change: dict[str, int]) -> int:
    return change["minor_faults"] + change["major_faults"]


def text(result: dict) -> str:
    requests, pairs = result["requests"], result["pairs"]
    columns = [(name, role) for name in pairs for role in ROLES]
    changes = [pairs[name]["changes"][role] for name, role in columns]
    calls = [pairs[name]["system_calls"][role] for name, role in columns]
    header = ("", *(f"{name}, {role}" for name, role in columns))
    per_call = [("each decode", *header[1:]), ("system calls", *(total(counts, requests) for counts in calls))]
    per_call += [
        (name.replace("_", " "), *(f"{change[name] / requests:.2f}" for change in changes)) for name in PER_CALL
    ]
    whole = [(f"change over {requests}", *header[1:])]
    whole += [
        (name.replace("_", " "), *(f"{change[name]:+d}" for change in changes))
        for name in changes[0]
        if name not in PER_CALL
    ]
    lines = [f"{OURS}: {pairs[OURS]['session']}", "", table(per_call), ""]
    lines += [
        f"{name}, {role}: {busiest(counts, requests)}" for (name, role), counts in zip(columns, calls, strict=True)
    ]
    lines += ["", table(whole), ""]
    lines += [f"{what}: {'holds' if held else 'DOES NOT HOLD'}" for what, held in result["verdicts"].items()]
    return "\n".join(lines)


def total(counts: dict, requests: int) -> str:
    return "not counted" if "skipped" in counts else f"{sum(counts.values()) / requests:.2f}"


def busiest(counts: dict, requests: int) -> str:
    if "skipped" in counts:
        return f"system calls not counted ({counts['skipped']})"
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {number / requests:.2f}" for name, number in ordered)


if __name__ == "__main__":
    sys.exit(main())
