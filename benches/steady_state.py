#!/usr/bin/env python3
"""Counts what one decode costs the operating system once all is warm: two messages, if all is well."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from harness.process_facts import NotTraced, ProcessFacts, SystemCalls
from harness.programs import PeerProcess, ProgramFailed, Server
from harness.report import table
from harness.sizes import GROWING_LATENT, MIDDLE

# Python allocates a little whatever it is asked to do; a page per request would be fifty times this.
FAULTS_THAT_COUNT_AS_NONE = 20
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


def main() -> int:
    chosen = arguments()
    with tempfile.TemporaryDirectory(prefix="luna-bench-") as name:
        folder = Path(name)
        socket_path = folder / "luna.socket"
        command = [
            str(Path(chosen.broker).resolve()),
            "serve",
            "--bench-models",
            "--socket",
            str(socket_path),
        ]
        try:
            server = Server(command, socket_path, folder / "broker.log")
        except ProgramFailed as failure:
            print(failure, file=sys.stderr)
            return 2
        client = PeerProcess("harness.luna_client", [str(socket_path)], folder / "client.log")
        try:
            server.wait_for_socket()
            session = client.ask("open").get("session")
            result = {"requests": chosen.requests, "session": session} | count(server, client, folder, chosen)
        except ProgramFailed as failure:
            print(failure, file=sys.stderr)
            return 2
        finally:
            client.close()
            server.close()

    result["verdicts"] = verdicts(result["changes"], chosen.requests)
    print(text(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(result["verdicts"].values()) else 1


def count(server: Server, client: PeerProcess, folder: Path, chosen: argparse.Namespace) -> dict:
    pids = {"broker": server.pid, "client": client.pid}

    def decode(times: int) -> None:
        client.ask("repeat", variant="in place", size=SIZE.as_json(), count=times)

    decode(chosen.warm_up)
    before = {role: ProcessFacts.of(pid) for role, pid in pids.items()}
    decode(chosen.requests)
    changes = {role: ProcessFacts.of(pid).since(before[role]) for role, pid in pids.items()}

    # Tracing slows every call down and makes pages of its own, so it has a run to itself.
    calls: dict[str, dict] = {}
    for role, pid in pids.items():
        try:
            with SystemCalls(pid, folder) as traced:
                decode(chosen.requests)
            calls[role] = traced.counts
        except NotTraced as reason:
            calls[role] = {"skipped": str(reason)}
    return {"changes": changes, "system_calls": calls}


def verdicts(changes: dict[str, dict[str, int]], requests: int) -> dict[str, bool]:
    most = FAULTS_THAT_COUNT_AS_NONE * max(1, requests / 1000)
    return {
        "no new mapping in broker or client": all(change["mappings"] <= 0 for change in changes.values()),
        "no page fault in the broker": faults(changes["broker"]) < most,
        "no page fault in the client": faults(changes["client"]) < most,
    }


def faults(change: dict[str, int]) -> int:
    return change["minor_faults"] + change["major_faults"]


def text(result: dict) -> str:
    changes, calls = result["changes"], result["system_calls"]
    rows = [(f"change over {result['requests']} decodes", *changes)]
    rows += [
        (name.replace("_", " "), *(f"{change[name]:+d}" for change in changes.values())) for name in changes["broker"]
    ]
    parts = [f"session: {result['session']}", table(rows)]
    parts += [call_lines(role, counts, result["requests"]) for role, counts in calls.items()]
    parts += [f"{what}: {'holds' if held else 'DOES NOT HOLD'}" for what, held in result["verdicts"].items()]
    return "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:])


def call_lines(role: str, counts: dict, requests: int) -> str:
    if "skipped" in counts:
        return f"system calls per request, {role}: skipped ({counts['skipped']})"
    busiest = sorted(counts.items(), key=lambda item: -item[1])[:5]
    named = ", ".join(f"{name} {number / requests:.2f}" for name, number in busiest)
    return f"system calls per request, {role}: {sum(counts.values()) / requests:.2f} ({named})"


if __name__ == "__main__":
    sys.exit(main())
