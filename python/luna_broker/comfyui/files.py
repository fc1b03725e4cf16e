"""Names of model files: which there are to choose from, and what a name means to this process and to the broker."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from luna_broker import LunaBrokerError, ModelNotFound, Timeout
from luna_broker.comfyui import brokers

Answer = TypeVar("Answer")

# How long a broker's list is not asked for again, and the list of one that hangs.
LISTED_S = 3.0
HANGS_S = 60.0
_LISTED: dict[str, tuple[float, list[dict[str, Any]]]] = {}

SAFE_ENDINGS = (".safetensors", ".sft")

# ComfyUI's folder and the broker's service for each kind of loader.
FOLDERS = {"checkpoint": "checkpoints", "unet": "diffusion_models", "clip": "text_encoders", "vae": "vae"}
SERVICES = {"checkpoint": "unet", "unet": "unet", "clip": "clip", "vae": "vae"}


@dataclass(frozen=True)
class Source:
    """A model file."""

    name: str
    """As it is chosen in a node."""
    path: str | None
    """Absolute, if this process can read it; else only the broker knows the file, by its name."""

    def ask(self, question: Callable[[str], Answer]) -> Answer:
        """The broker's answer to a question about the file: by its path, or by name where its folders are others."""
        if self.path is None:
            return question(self.name)
        try:
            return question(self.path)
        except ModelNotFound:
            try:
                return question(self.name)
            except ModelNotFound:
                pass
            raise


def resolve(kind: str, name: str) -> Source:
    """What a name means: a file in ComfyUI's folders for that kind, an absolute path, else a name for the broker."""
    path = None if os.path.isabs(name) else _in_comfyui(FOLDERS[kind], name)
    # Of files outside ComfyUI's folders this process reads none that could run code: a workflow may come from anybody.
    if path is None and os.path.isabs(name) and name.endswith(SAFE_ENDINGS) and os.path.isfile(name):
        path = name
    return Source(name, None if path is None else os.path.abspath(path))


def choices(kind: str) -> list[str]:
    """Files in ComfyUI's folders for that kind, and behind them what else the default broker has. Raises nothing."""
    own = _listed(FOLDERS[kind])
    models = _broker_models()
    known = {resolve(kind, name).path for name in own}
    offered: dict[str, set[str]] = {}
    for model in models:
        if model["registered_by"] is None and model["path"] not in known:
            offered.setdefault(model["name"], set()).add(model["service"])
    # The broker lists each part of a file by itself, and a checkpoint has several.
    more = [name for name, parts in offered.items() if _fits(kind, parts) and not Path(name).is_absolute()]
    return own + sorted(set(more) - set(own))


def _broker_models() -> list[dict[str, Any]]:
    """What the default broker lists. A page asks for every node's inputs at once, on the thread that serves pages."""
    until, known = _LISTED.get("default", (-math.inf, []))
    if time.monotonic() < until:
        return known
    lasts_s = LISTED_S
    try:
        known = brokers.quick().models()
    except Timeout:
        known, lasts_s = [], HANGS_S
    except LunaBrokerError:
        known = []
    _LISTED["default"] = (time.monotonic() + lasts_s, known)
    return known


def _fits(kind: str, parts: set[str]) -> bool:
    return {"unet", "clip"} <= parts if kind == "checkpoint" else parts == {SERVICES[kind]}


def _listed(folder: str) -> list[str]:
    try:
        import folder_paths
    except ImportError:
        return []
    return list(folder_paths.get_filename_list(folder))


def _in_comfyui(folder: str, name: str) -> str | None:
    try:
        import folder_paths
    except ImportError:
        return None
    found = folder_paths.get_full_path(folder, name)
    return None if found is None else str(found)
