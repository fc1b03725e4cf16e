"""The UNet that attaching is measured with: the shape of Stable Diffusion 1.5's, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from luna_broker.torch import skeleton
from safetensors.torch import save_file

SEED = 20
# What a trained UNet's weights are about as large as: activations stay within float16.
DEVIATION = 0.02
CONTEXT = 768
FULL = {"sample_size": 64, "cross_attention_dim": CONTEXT, "attention_head_dim": 8}
QUICK = FULL | {"block_out_channels": (32, 64, 64, 64)}


def build(quick: bool) -> UNet2DConditionModel:
    """The module, with parameters that take no memory."""
    with skeleton():
        return UNet2DConditionModel(**(QUICK if quick else FULL)).eval()


def write(path: Path, quick: bool) -> None:
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, parameter in build(quick).named_parameters():
        random = torch.randn(parameter.shape, generator=generator).mul_(DEVIATION)
        is_scale = "norm" in name and name.endswith("weight")
        tensors[name] = random.add_(1.0 if is_scale else 0.0).to(torch.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    save_file(tensors, unfinished)
    unfinished.rename(path)


def forward(module: UNet2DConditionModel, dtype: torch.dtype) -> torch.Tensor:
    """One step on an 8 x 8 latent with a few tokens, the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    latent = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(1, 8, CONTEXT, generator=generator).to(dtype)
    with torch.inference_mode():
        return module(latent, 500, context).sample
