"""Custom nodes that only the tests need: they keep raw tensors, and replace attention as other packs do."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch


def _keep(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    # Never the same file twice: what ComfyUI keeps of an earlier workflow must stay what it was.
    file = f"{uuid.uuid4().hex}.npy"
    folder = Path(folder_paths.get_output_directory()) / "kept"
    folder.mkdir(exist_ok=True)
    np.save(folder / file, tensor.detach().to(torch.float32).cpu().numpy())
    return {"name": name, "file": file}


class KeepLatent:
    """Writes a latent as it is: no picture format rounds it."""

    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    def keep(self, samples: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
        return {"ui": {"kept": [_keep(name, samples["samples"])]}}


class KeepImage:
    """Writes an image as it is."""

    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": "image"})}}

    def keep(self, images: torch.Tensor, name: str) -> dict[str, Any]:
        return {"ui": {"kept": [_keep(name, images)]}}


class KeepConditioning:
    """Writes the tensors of a conditioning: the prompt's and, where there is one, the pooled one."""

    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {"default": "conditioning"})}}

    def keep(self, conditioning: list[Any], name: str) -> dict[str, Any]:
        kept = []
        for at, (cond, more) in enumerate(conditioning):
            kept.append(_keep(f"{name}-{at}", cond))
            if more.get("pooled_output") is not None:
                kept.append(_keep(f"{name}-{at}-pooled", more["pooled_output"]))
        return {"ui": {"kept": kept}}


class ReplaceAttention:
    """Replaces the self-attention of the UNet's input block 1 by a mean over all places."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        def mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            return v.mean(dim=1, keepdim=True).expand_as(q)

        patched = model.clone()
        patched.set_model_attn1_replace(mean, "input", 1, 0)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    "LunaBrokerTestsKeepLatent": KeepLatent,
    "LunaBrokerTestsKeepImage": KeepImage,
    "LunaBrokerTestsKeepConditioning": KeepConditioning,
    "LunaBrokerTestsReplaceAttention": ReplaceAttention,
}
