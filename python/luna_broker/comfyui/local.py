"""Models of this process's own, loaded as ComfyUI's loaders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from luna_broker.comfyui.attached.dtypes import PRECISIONS


def checkpoint(path: str, precision: str) -> tuple[Any, Any, Any]:
    """ModelPatcher, CLIP and VAE of a checkpoint."""
    return tuple(
        comfy.sd.load_checkpoint_guess_config(
            path, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options=_options(precision)
        )[:3]
    )


def diffusion_model(path: str, precision: str) -> Any:
    """ModelPatcher of a file with a diffusion model."""
    return comfy.sd.load_diffusion_model(path, model_options=_options(precision))


def text_encoders(paths: Sequence[str], kind: str) -> Any:
    """CLIP of one or several files."""
    return comfy.sd.load_clip(
        ckpt_paths=list(paths),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
    )


def vae(path: str) -> Any:
    """VAE of a file."""
    made = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path))
    made.throw_exception_if_invalid()
    return made


def _options(precision: str) -> dict[str, Any]:
    dtype = PRECISIONS[precision]
    return {} if dtype is None else {"dtype": dtype}
