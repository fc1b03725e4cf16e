"""In which element types, and on which devices, ComfyUI would have the parts of a file: what to ask the broker for.

Found out from keys, types and shapes alone, by asking ComfyUI's own functions as its loaders do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.model_detection as detection
import comfy.model_management as mm
import comfy.supported_models as families
import comfy.utils
import torch
from luna_broker import Unsupported
from luna_broker.errors import refusal

Header = Mapping[str, tuple[str, Sequence[int]]]

PRECISIONS = {
    "auto": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# What KL VAEs and TAESD may be computed in, in ComfyUI's order.
VAE_TYPES = [torch.bfloat16, torch.float32]

# Families whose text encoders ComfyUI has in `text_encoder_dtype`, whatever the file has. Others look at the file.
CLIP_FAMILIES = (families.SD15, families.SD20, families.SDXL, families.SDXLRefiner)

LOCALLY = "load it with mode local"


@dataclass(frozen=True)
class Part:
    """A part of a file: what keys begin with, and how it is to be had."""

    prefixes: tuple[str, ...]
    dtype: torch.dtype | None
    """What ComfyUI computes with, or has it cast from; `None` for as it is stored."""
    device: torch.device

    @property
    def converted_to(self) -> torch.dtype | None:
        """What to ask the broker for: what is to be in float8 is so in the file."""
        return None if self.dtype in FLOAT8 else self.dtype


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint."""

    unet: Part
    clip: Part
    vae: Part


def checkpoint(name: str, header: Header, precision: str) -> Checkpoint:
    """How ComfyUI would have a checkpoint. Raises `Unsupported` where it would not know the diffusion model."""
    tensors = _described(header)
    prefix = detection.unet_prefix_from_state_dict(tensors)
    unet, config = _unet(name, tensors, prefix, precision)
    clip_dtype = mm.text_encoder_dtype(mm.text_encoder_device()) if isinstance(config, CLIP_FAMILIES) else None
    clip = Part(tuple(config.text_encoder_key_prefix), clip_dtype, mm.text_encoder_device())
    return Checkpoint(unet, clip, vae(tuple(config.vae_key_prefix)))


def diffusion_model(name: str, header: Header, precision: str) -> Part:
    """How ComfyUI would have a diffusion model that comes alone, or in a checkpoint. Raises `Unsupported`."""
    tensors = _described(header)
    prefix = detection.unet_prefix_from_state_dict(tensors)
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
    return _unet(name, tensors, prefix, precision)[0]


def text_encoder() -> Part:
    """How ComfyUI would have a text encoder of the CLIP kind."""
    device = mm.text_encoder_device()
    return Part(("",), mm.text_encoder_dtype(device), device)


def vae(prefixes: tuple[str, ...] = ("",)) -> Part:
    """How ComfyUI would have a VAE."""
    device = mm.vae_device()
    return Part(prefixes, mm.vae_dtype(device, VAE_TYPES), device)


def _unet(name: str, tensors: dict[str, torch.Tensor], prefix: str, precision: str) -> tuple[Part, families.BASE]:
    if any(key.startswith(prefix) and key.endswith("scaled_fp8") for key in tensors):
        raise refusal(Unsupported, f"{name} is in scaled float8, which is not attached; nothing was loaded", LOCALLY)
    parameters = comfy.utils.calculate_parameters(tensors, prefix)
    stored = comfy.utils.weight_dtype(tensors, prefix)
    config = detection.model_config_from_unet(tensors, prefix)
    if config is None and not prefix:
        config = detection.model_config_from_diffusers_unet(tensors)
    if config is None:
        raise refusal(Unsupported, f"ComfyUI knows no diffusion model like that in {name}; nothing was loaded", LOCALLY)
    dtype = PRECISIONS[precision]
    if dtype is None:
        supported = list(config.supported_inference_dtypes)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    if dtype in FLOAT8 and stored != dtype:
        message = f"{name} is stored as {stored}, and the broker converts nothing to {dtype}; nothing was loaded"
        raise refusal(Unsupported, message, "choose another precision or mode local, or a file that is in float8")
    return Part((prefix,), dtype, mm.get_torch_device()), config


def _described(header: Header) -> dict[str, torch.Tensor]:
    """Tensors with types and shapes, and without values."""
    return {
        key: torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
        for key, (dtype, shape) in header.items()
    }
