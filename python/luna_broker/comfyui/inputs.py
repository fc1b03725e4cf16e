"""Inputs that several nodes have besides those of loaders, each said once."""

from __future__ import annotations

from typing import Any

from luna_broker.comfyui import files
from luna_broker.comfyui.nodes.loaders import NONE

Input = tuple[Any, dict[str, Any]]

CLIP_SKIP: Input = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": 24,
        "tooltip": "Which block's result is used, counted from the end: 1 is the last one, 2 is CLIP Set Last Layer's"
        " -2. 0 for what the model was trained with.",
    },
)


def text(tooltip: str) -> Input:
    return "STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": tooltip}


def number(kind: str, default: float, least: float, most: float, step: float, tooltip: str) -> Input:
    return kind, {"default": default, "min": least, "max": most, "step": step, "tooltip": tooltip}


def part(kind: str, tooltip: str, optional: bool = False) -> Input:
    """A file of the broker's or of ComfyUI's folders: of that kind alone, or a checkpoint that has it."""
    names = dict.fromkeys(name for folder in (kind, "checkpoint") for name in files.choices(folder))
    return [*([NONE] if optional else []), *names], {"tooltip": tooltip}


def source(kind: str, name: str) -> files.Source:
    """What a choice of `part` means."""
    found = files.resolve(kind, name)
    return found if found.path is not None else files.resolve("checkpoint", name)
