"""Puts this folder among a ComfyUI's custom nodes, or takes it away: `python -m luna_broker comfyui PATH`.

By itself, as ComfyUI-Manager runs it once it has put the folder in its place, it looks whether the package is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent

# The folder's name among the custom nodes; web pages and templates are found by it.
NAME = "luna-broker"

ABOUT = """Links the nodes into a ComfyUI as custom_nodes/luna-broker; copies them where links cannot be made."""

# What Python leaves behind, and what an editor does, is no part of the pack.
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class NotInstalled(RuntimeError):
    """Nothing was changed; the text says why, and what to do."""


def install(comfyui: Path) -> str:
    """Links the pack into a ComfyUI, or copies it where links cannot be made, and says what was done.

    Doing it again is harmless: a link stays, a copy is made anew. Raises `NotInstalled`.
    """
    place = _place(comfyui)
    if place.is_symlink() and place.resolve() == PACK:
        return f"{place} is a link to {PACK} already: nothing was changed."
    was = _occupant(place)
    # Under another name until it is complete: half a pack is not loaded, and what was there stays meanwhile.
    fresh = place.with_name(f"{NAME}.{os.getpid()}.disabled")
    try:
        done = _link_or_copy(fresh)
        _remove(place)
        fresh.rename(place)
    except OSError as error:
        _remove(fresh)
        raise NotInstalled(f"the pack could not be put at {place}: {error}") from error
    instead = f", instead of {was}" if was else ""
    return f"{place} is now {done}{instead}."


def uninstall(comfyui: Path) -> str:
    """Takes the pack out of a ComfyUI and says what was done. Raises `NotInstalled`."""
    place = _place(comfyui)
    was = _occupant(place)
    if was is None:
        return f"{place} is not there: nothing was changed."
    try:
        _remove(place)
    except OSError as error:
        raise NotInstalled(f"{place} could not be taken away: {error}") from error
    return f"{place}, {was}, was taken away."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="folder of ComfyUI: where main.py and custom_nodes are")
    parser.add_argument("--uninstall", action="store_true", help="take the pack out of it again")


def run(chosen: argparse.Namespace) -> int:
    """Does what was asked for on the command line, and returns the exit code."""
    try:
        if chosen.uninstall:
            print(uninstall(chosen.path))
        else:
            print(install(chosen.path))
            print(f"ComfyUI has to run with a Python that has luna-broker, as {sys.executable} has. Restart it.")
    except NotInstalled as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _place(comfyui: Path) -> Path:
    """Where the pack belongs. A portable ComfyUI has the real one in a folder inside."""
    for folder in (comfyui, comfyui / "ComfyUI"):
        if _is_comfyui(folder):
            return folder.resolve() / "custom_nodes" / NAME
    raise NotInstalled(
        f"{comfyui} is no ComfyUI: a checkout has main.py, comfy and custom_nodes, and what --base-directory names has"
        " models and custom_nodes. Nothing was changed; give the folder that has them."
    )


def _is_comfyui(folder: Path) -> bool:
    if not (folder / "custom_nodes").is_dir():
        return False
    return (folder / "models").is_dir() or ((folder / "main.py").is_file() and (folder / "comfy").is_dir())


def _occupant(place: Path) -> str | None:
    """What is there, if it is this pack, of whatever version. Raises `NotInstalled` for anything else."""
    if place.is_symlink():
        target = place.resolve()
        if target.exists() and not _is_pack(target):
            raise _foreign(place, f"a link to {target}")
        return f"a link to {target}"
    if not place.exists():
        return None
    if not _is_pack(place):
        raise _foreign(place, "something else")
    return "a copy of the pack"


def _foreign(place: Path, what: str) -> NotInstalled:
    return NotInstalled(f"{place} is {what}, not this pack, and was left as it is. Move it away, and try again.")


def _is_pack(folder: Path) -> bool:
    try:
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False
    return f'name = "{NAME}"\n' in project and "[tool.comfy]" in project


def _link_or_copy(place: Path) -> str:
    try:
        place.symlink_to(PACK, target_is_directory=True)
        return f"a link to {PACK}"
    except OSError as error:
        shutil.copytree(PACK, place, ignore=NOT_COPIED)
        why = error.strerror or error
        return f"a copy of {PACK} (no link could be made: {why}; run this again after each update)"


def _remove(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)


def _check() -> int:
    if importlib.util.find_spec("luna_broker") is None:
        print(f"error: the pack needs luna-broker: {sys.executable} -m pip install luna-broker", file=sys.stderr)
        return 1
    print("luna-broker is there: the pack is complete.")
    return 0


if __name__ == "__main__":
    sys.exit(_check())
