"""Models that this process computes with, on weights that lie in the broker's memory once for everybody.

ComfyUI's own classes do the work; their parameters are views on the broker's memory. Each function raises
`LunaBrokerError` where the broker cannot give the weights or this ComfyUI cannot take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luna_broker import Client
from luna_broker.comfyui.files import Source

__all__ = ["checkpoint", "diffusion_model", "text_encoders", "vae"]


def checkpoint(client: Client, source: Source, precision: str = "auto") -> tuple[Any, Any, Any]:
    """ModelPatcher, CLIP and VAE of a checkpoint; `None` for what it lacks. `precision` is of the diffusion model."""
    from luna_broker.comfyui.attached import loading

    return loading.checkpoint(client, source, precision)


def diffusion_model(client: Client, source: Source, precision: str = "auto") -> Any:
    """ModelPatcher of a file with a diffusion model."""
    from luna_broker.comfyui.attached import loading

    return loading.diffusion_model(client, source, precision)


def text_encoders(client: Client, sources: Sequence[Source], kind: str) -> Any:
    """CLIP of one or several files. `kind`: one of the types of ComfyUI's CLIP loaders, such as "stable_diffusion"."""
    from luna_broker.comfyui.attached import loading

    return loading.text_encoders(client, sources, kind)


def vae(client: Client, source: Source) -> Any:
    """VAE of a file."""
    from luna_broker.comfyui.attached import loading

    return loading.vae(client, source)
