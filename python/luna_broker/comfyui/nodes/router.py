"""One loader for a checkpoint or for a diffusion model with its parts in files of their own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from luna_broker import ConfigurationError
from luna_broker.comfyui import brokers, files, loading, notices
from luna_broker.comfyui.nodes.loaders import CATEGORY, CLIP_TYPES, NONE, PRECISION, choices
from luna_broker.errors import refusal

CHECKPOINT, DIFFUSION_MODEL = "checkpoint", "diffusion model"


class _Part(NamedTuple):
    """What is loaded by itself."""

    kind: str
    names: tuple[str, ...]
    options: dict[str, str]


class ModelRouter:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a checkpoint, or a diffusion model with text encoders and VAE from files of their own, that all workers"
        " of this machine share. Text encoders and a VAE that are chosen take the place of the checkpoint's."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "choice")
    OUTPUT_TOOLTIPS = (
        "The diffusion model.",
        "The text encoders; nothing where none were chosen.",
        "The VAE; nothing where none was chosen.",
        "In which mode each of them is, and why: a line each.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "source": (
                    [CHECKPOINT, DIFFUSION_MODEL],
                    {"default": CHECKPOINT, "tooltip": "Whether the file is a checkpoint or a diffusion model alone."},
                ),
                "ckpt_name": _file("checkpoint", "The checkpoint, where the source is one."),
                "unet_name": _file("unet", "The diffusion model, where the source is one."),
                "clip_name1": _file("clip", "Text encoders. none: the checkpoint's."),
                "clip_name2": _file("clip", "The other one of two text encoders that belong together, in any order."),
                "vae_name": _file("vae", "The VAE. none: the checkpoint's."),
                "type": (
                    list(CLIP_TYPES),
                    {"default": CLIP_TYPES[0], "tooltip": "What text encoders in files of their own are encoders of."},
                ),
            },
            "optional": choices(precision=PRECISION),
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        ckpt_name: Any = None,
        unet_name: Any = None,
        clip_name1: Any = None,
        clip_name2: Any = None,
        vae_name: Any = None,
    ) -> bool:
        # The lists are of the default broker, and a node may ask another.
        return True

    @classmethod
    def IS_CHANGED(cls, node: str | None = None, **inputs: str) -> str | float:
        if None in inputs.values():
            # What comes from another node is not there yet.
            return brokers.generation(inputs.get("broker") or "")
        try:
            parts = _parts(**inputs)
        except ConfigurationError:
            return ""
        changes = [loading.changed(part.kind, part.names, **part.options) for part in parts]
        return math.nan if math.nan in changes else " ".join(map(str, changes))

    def load(self, node: str | None = None, **inputs: str) -> dict[str, Any]:
        found: dict[str, Any] = {"model": None, "clip": None, "vae": None}
        lines = []
        for part in _parts(**inputs):
            loaded = loading.load(part.kind, part.names, node=node, **part.options)
            found |= {name: had for name in found if (had := getattr(loaded, name)) is not None}
            lines.append(f"{', '.join(part.names)} is {loaded.line}")
        if len(lines) > 1:
            # Each of them was said already, in place of the one before.
            notices.tell(node, "\n".join(lines))
        return {"ui": {"text": lines}, "result": (*found.values(), "\n".join(lines))}


def _file(kind: str, tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return [NONE, *files.choices(kind)], {"default": NONE, "tooltip": tooltip}


def _parts(
    source: str,
    ckpt_name: str,
    unet_name: str,
    clip_name1: str,
    clip_name2: str,
    vae_name: str,
    type: str,
    mode: str = "auto",
    on_failure: str = "local",
    broker: str = "",
    precision: str = "auto",
) -> list[_Part]:
    """What is to be loaded, in such an order that what comes later takes the place of what was there.

    Raises `ConfigurationError` where nothing was chosen for the source.
    """
    kind, name, input_name = {
        CHECKPOINT: ("checkpoint", ckpt_name, "ckpt_name"),
        DIFFUSION_MODEL: ("unet", unet_name, "unet_name"),
    }[source]
    if name == NONE:
        raise refusal(ConfigurationError, f"the source is a {source}, and {input_name} is none", "choose a file for it")
    options = {"mode": mode, "on_failure": on_failure, "address": broker}
    parts = [_Part(kind, (name,), {**options, "precision": precision})]
    encoders = tuple(chosen for chosen in (clip_name1, clip_name2) if chosen != NONE)
    if encoders:
        parts.append(_Part("clip", encoders, {**options, "type": type}))
    if vae_name != NONE:
        parts.append(_Part("vae", (vae_name,), options))
    return parts


NODE_CLASS_MAPPINGS: dict[str, type] = {"LunaBrokerModelRouter": ModelRouter}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"LunaBrokerModelRouter": "Model Router (Luna Broker)"}
