"""Which ComfyUI this pack is made for, and what a running one lacks of it.

ComfyUI has no interface for what the pack does: it relies on classes and functions of its inside. Each of them is
looked at before it is relied on, so that another version ends in a local model and a line that says why.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

# The version that everything is tested with.
SUPPORTED = "0.3.64"

# What attached models touch: module, attribute, and the parameters that are relied on where it is a function. Those
# that `AttachedPatcher` overrides must have exactly these.
ATTACHED: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("comfy.sd", "load_state_dict_guess_config", ("sd", "embedding_directory", "model_options", "te_model_options")),
    ("comfy.sd", "load_diffusion_model_state_dict", ("sd", "model_options")),
    ("comfy.sd", "load_text_encoder_state_dicts", ("state_dicts", "embedding_directory", "clip_type", "model_options")),
    ("comfy.sd", "CLIPType", None),
    ("comfy.sd", "VAE.__init__", ("self", "sd")),
    ("comfy.sd", "VAE.decode", ("self", "samples_in", "vae_options")),
    ("comfy.sd", "VAE.encode", ("self", "pixel_samples")),
    ("comfy.sd", "VAE.decode_tiled", ("self", "samples", "tile_x", "tile_y", "overlap")),
    ("comfy.sd", "VAE.encode_tiled", ("self", "pixel_samples", "tile_x", "tile_y", "overlap")),
    ("comfy.sd", "CLIP.load_sd", ("self", "sd")),
    ("comfy.model_base", "BaseModel.load_model_weights", ("self", "sd", "unet_prefix")),
    ("comfy.model_detection", "unet_prefix_from_state_dict", ("state_dict",)),
    ("comfy.model_detection", "model_config_from_unet", ("state_dict", "unet_key_prefix")),
    ("comfy.model_detection", "model_config_from_diffusers_unet", ("state_dict",)),
    ("comfy.model_management", "unet_dtype", ("model_params", "supported_dtypes", "weight_dtype")),
    ("comfy.model_management", "unet_inital_load_device", ("parameters", "dtype")),
    ("comfy.model_management", "text_encoder_dtype", ("device",)),
    ("comfy.model_management", "text_encoder_device", ()),
    ("comfy.model_management", "vae_dtype", ("device", "allowed_dtypes")),
    ("comfy.model_management", "vae_device", ()),
    ("comfy.model_management", "get_torch_device", ()),
    ("comfy.model_management", "force_channels_last", ()),
    ("comfy.model_management", "is_intel_xpu", ()),
    ("comfy.lora", "calculate_weight", ("patches", "weight", "key", "original_weights")),
    ("comfy.float", "stochastic_rounding", ("value", "dtype", "seed")),
    ("comfy.weight_adapter", "WeightAdapterBase", None),
    ("comfy.utils", "get_attr", ("obj", "attr")),
    ("comfy.utils", "set_attr_param", ("obj", "attr", "value")),
    ("comfy.hooks", "EnumHookMode.MaxSpeed", None),
    ("comfy.utils", "calculate_parameters", ("sd", "prefix")),
    ("comfy.utils", "weight_dtype", ("sd", "prefix")),
    ("comfy.utils", "ProgressBar.update_absolute", ("self", "value", "total")),
    ("comfy.supported_models", "SDXLRefiner", None),
    ("folder_paths", "get_folder_paths", ("folder_name",)),
    ("comfy.patcher_extension", "WrappersMP.OUTER_SAMPLE", None),
    ("comfy.model_patcher", "create_model_options_clone", ("orig_model_options",)),
    ("comfy.model_patcher", "create_hook_patches_clone", ("orig_hook_patches",)),
    ("comfy.model_patcher", "get_key_weight", ("model", "key")),
    ("comfy.model_patcher", "string_to_seed", ("data",)),
)
PATCHER: dict[str, tuple[str, ...]] = {
    "__init__": ("self", "model", "load_device", "offload_device", "size", "weight_inplace_update"),
    "model_size": ("self",),
    "clone": ("self",),
    "load": ("self", "device_to", "lowvram_model_memory", "force_patch_weights", "full_load"),
    "_load_list": ("self",),
    "patch_weight_to_device": ("self", "key", "device_to", "inplace_update"),
    "patch_hook_weight_to_device": ("self", "hooks", "combined_patches", "key", "original_weights", "memory_counter"),
    "patch_cached_hook_weights": ("self", "cached_weights", "key", "memory_counter"),
    "unpatch_hooks": ("self", "whitelist_keys_set"),
    "set_attachments": ("self", "key", "attachment"),
    "get_attachment": ("self", "key"),
}


def version() -> str | None:
    """The version of the ComfyUI that runs; `None` outside of one, and of one that does not say."""
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return None


@functools.cache
def missing(kind: str) -> list[str]:
    """What this ComfyUI lacks, or has otherwise, of what models of that kind ("attached", "remote") rely on."""
    if kind == "remote":
        from luna_broker.comfyui.remote import relied_on

        return look(relied_on())
    found = look(ATTACHED)
    try:
        patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    except (ImportError, AttributeError):
        return [*found, "comfy.model_patcher.ModelPatcher"]
    return found + [
        f"comfy.model_patcher.ModelPatcher.{name}"
        for name, parameters in PATCHER.items()
        if _parameters(getattr(patcher, name, None)) != parameters
    ]


def look(relied_on: tuple[tuple[str, str, tuple[str, ...] | None], ...]) -> list[str]:
    """Which of these, given as module, attribute and the parameters it must take (`None` for any), are not there."""
    return [
        f"{module}.{attribute}" for module, attribute, parameters in relied_on if not _is(module, attribute, parameters)
    ]


def is_known() -> bool:
    """Whether this ComfyUI is the one that everything is tested with."""
    return version() == SUPPORTED


def _is(module: str, attribute: str, parameters: tuple[str, ...] | None) -> bool:
    try:
        found: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    if parameters is None:
        return True
    has = _parameters(found)
    return has is not None and set(parameters) <= set(has)


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...] | None:
    try:
        return None if function is None else tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
