"""What this Python can say or do about luna-broker: `python -m luna_broker doctor`, `python -m luna_broker comfyui`."""

import argparse
import json
import sys

from ._native import diagnose
from .comfyui import install


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m luna_broker")
    commands = parser.add_subparsers(required=True)
    doctor = commands.add_parser(
        "doctor",
        help="driver, GPUs, broker, how tensors would cross and why; and what to do about the rest",
        epilog="Ends with 0 if a client could work, else with an exit code of `luna-broker --help`.",
    )
    doctor.add_argument("--socket", metavar="PATH", help="default: $LUNA_BROKER, else this user's default socket")
    doctor.add_argument("--json", action="store_true", help="a list of check, verdict (ok, note, fail), found, remedy")
    doctor.set_defaults(run=_diagnose)
    comfyui = commands.add_parser(
        "comfyui", help="put the nodes into a ComfyUI, or take them out", description=install.ABOUT
    )
    install.add_arguments(comfyui)
    comfyui.set_defaults(run=install.run)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))


def _diagnose(chosen: argparse.Namespace) -> int:
    diagnosis = diagnose(chosen.socket)
    print(json.dumps(diagnosis.findings, indent=2) if chosen.json else str(diagnosis).rstrip("\n"))
    return diagnosis.exit_code


if __name__ == "__main__":
    sys.exit(main())
