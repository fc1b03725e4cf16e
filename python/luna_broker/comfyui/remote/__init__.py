"""Models that the broker computes with, as ComfyUI's own: samplers, nodes and LoRAs work on them unchanged.

Everything but the networks is real and of this process. Each function raises `LunaBrokerError` where the broker cannot
run the model or this ComfyUI is another than they are made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luna_broker import Client, Unsupported
from luna_broker.comfyui.files import Source
from luna_broker.errors import refusal

__all__ = ["checkpoint", "diffusion_model", "relied_on", "text_encoders", "vae", "with_block_cache"]

OPTIONS = "luna_broker"

# Module, attribute, and the parameters that are relied on where it is a function.
_RELIED_ON: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("comfy.model_patcher", "ModelPatcher.__init__", ("self", "model", "load_device", "offload_device", "size")),
    (
        "comfy.model_patcher",
        "ModelPatcher.load",
        ("self", "device_to", "lowvram_model_memory", "force_patch_weights", "full_load"),
    ),
    (
        "comfy.model_patcher",
        "ModelPatcher.patch_model",
        ("self", "device_to", "lowvram_model_memory", "load_weights", "force_patch_weights"),
    ),
    ("comfy.model_patcher", "ModelPatcher.pre_run", ("self",)),
    ("comfy.model_patcher", "ModelPatcher.cleanup", ("self",)),
    ("comfy.model_patcher", "ModelPatcher.patch_hooks", ("self", "hooks")),
    ("comfy.model_patcher", "ModelPatcher.unpatch_hooks", ("self", "whitelist_keys_set")),
    ("comfy.model_patcher", "ModelPatcher.get_combined_hook_patches", ("self", "hooks")),
    ("comfy.model_patcher", "ModelPatcher.get_key_patches", ("self", "filter_prefix")),
    ("comfy.model_patcher", "ModelPatcher.model_state_dict", ("self", "filter_prefix")),
    ("comfy.model_patcher", "ModelPatcher.set_attachments", ("self", "key", "attachment")),
    ("comfy.patcher_extension", "WrapperExecutor.new_class_executor", None),
    ("comfy.patcher_extension", "WrappersMP.DIFFUSION_MODEL", None),
    ("comfy.patcher_extension", "get_all_wrappers", ("wrapper_type", "transformer_options")),
    ("comfy.model_base", "BaseModel", None),
    ("comfy.model_base", "ModelType.V_PREDICTION_EDM", None),
    ("comfy.model_detection", "unet_prefix_from_state_dict", ("state_dict",)),
    ("comfy.model_detection", "model_config_from_unet", ("state_dict", "unet_key_prefix")),
    ("comfy.model_detection", "model_config_from_diffusers_unet", ("state_dict",)),
    ("comfy.supported_models", "SD15.get_model", ("self", "state_dict", "prefix", "device")),
    ("comfy.supported_models", "SD15.process_clip_state_dict", ("self", "state_dict")),
    ("comfy.supported_models", "SD15.set_inference_dtype", ("self", "dtype", "manual_cast_dtype")),
    ("comfy.model_management", "unet_dtype", ("model_params", "supported_dtypes", "weight_dtype")),
    ("comfy.model_management", "unet_manual_cast", ("weight_dtype", "inference_device", "supported_dtypes")),
    ("comfy.model_management", "unet_offload_device", ()),
    ("comfy.model_management", "intermediate_device", ()),
    ("comfy.model_management", "text_encoder_device", ()),
    ("comfy.model_management", "text_encoder_offload_device", ()),
    ("comfy.model_management", "text_encoder_dtype", ("device",)),
    ("comfy.model_management", "vae_device", ()),
    ("comfy.model_management", "vae_offload_device", ()),
    ("comfy.model_management", "vae_dtype", ("device", "allowed_dtypes")),
    ("comfy.model_management", "OOM_EXCEPTION", None),
    ("comfy.lora", "calculate_weight", ("patches", "weight", "key", "original_weights")),
    ("comfy.weight_adapter", "WeightAdapterBase", None),
    ("comfy.utils", "load_torch_file", ("ckpt",)),
    ("comfy.utils", "unet_to_diffusers", ("unet_config",)),
    ("comfy.utils", "calculate_parameters", ("sd", "prefix")),
    ("comfy.utils", "weight_dtype", ("sd", "prefix")),
    ("comfy.utils", "clip_text_transformers_convert", ("sd", "prefix_from", "prefix_to")),
    ("comfy.sd", "CLIP.__init__", ("self", "no_init")),
    ("comfy.sd", "CLIP.clone", ("self",)),
    ("comfy.sd", "VAE.__init__", ("self", "sd")),
    ("comfy.sd", "VAE.decode", ("self", "samples_in", "vae_options")),
    ("comfy.sd", "VAE.encode", ("self", "pixel_samples")),
    ("comfy.sd", "VAE.decode_tiled", ("self", "samples", "tile_x", "tile_y", "overlap", "tile_t", "overlap_t")),
    ("comfy.sd", "VAE.encode_tiled", ("self", "pixel_samples", "tile_x", "tile_y", "overlap", "tile_t", "overlap_t")),
    ("comfy.sd", "detect_te_model", ("sd",)),
    ("comfy.sd", "TEModel.CLIP_G", None),
    ("comfy.sd1_clip", "SD1Tokenizer.__init__", ("self", "embedding_directory", "tokenizer_data")),
    ("comfy.sdxl_clip", "SDXLTokenizer.__init__", ("self", "embedding_directory", "tokenizer_data")),
    ("comfy.text_encoders.sd2_clip", "SD2Tokenizer.__init__", ("self", "embedding_directory", "tokenizer_data")),
    ("comfy.hooks", "EnumHookMode.MinVram", None),
)


def relied_on() -> tuple[tuple[str, str, tuple[str, ...] | None], ...]:
    """What remote models touch of ComfyUI, for `compat.look`."""
    return _RELIED_ON


def checkpoint(client: Client, source: Source) -> tuple[Any, Any, Any]:
    """ModelPatcher, CLIP and VAE of a checkpoint; of what it lacks, what ComfyUI's loader gives."""
    _refuse_unknown(source.name)
    import comfy.sd
    from luna_broker.comfyui.remote import autoencoder, clip, model

    found = model.detect(client, source)
    prefixes = tuple(found.config.vae_key_prefix)
    has_vae = any(key.startswith(prefixes) for key in found.header)
    return (
        model.build(client, found),
        clip.of_checkpoint(client, found),
        autoencoder.load(client, source) if has_vae else comfy.sd.VAE(sd={}),
    )


def diffusion_model(client: Client, source: Source, precision: str = "auto") -> Any:
    """ModelPatcher of a file with a diffusion model. `precision`: of what is sent."""
    _refuse_unknown(source.name)
    from luna_broker.comfyui.remote import model

    return model.build(client, model.detect(client, source), precision)


def text_encoders(client: Client, sources: Sequence[Source], kind: str) -> Any:
    """CLIP of one or several files. `kind`: one of the types of ComfyUI's CLIP loaders, such as "stable_diffusion"."""
    _refuse_unknown(", ".join(source.name for source in sources))
    from luna_broker.comfyui.remote import clip

    return clip.of_files(client, sources, kind)


def vae(client: Client, source: Source) -> Any:
    """VAE of a file."""
    _refuse_unknown(source.name)
    # Not called as this function is: a module of that name would take its place in the package.
    from luna_broker.comfyui.remote import autoencoder

    return autoencoder.load(client, source)


def with_block_cache(
    patcher: Any, threshold: float, start: float = 0.0, end: float = 1.0, max_hits: int | None = None
) -> Any:
    """A clone of a remote ModelPatcher that leaves out steps whose first block changes little.

    `threshold`: how little, 0.1 to 0.2 is usual. `start`, `end`: shares of the sampling in which it may. `max_hits`:
    steps left out in a row; `None` for any number.
    """
    cached = patcher.clone()
    wanted = {"threshold": threshold, "start": start, "end": end, "max_hits": max_hits}
    options = cached.model_options["transformer_options"]
    options[OPTIONS] = {**options.get(OPTIONS, {}), "fb_cache": wanted}
    return cached


def _refuse_unknown(name: str) -> None:
    """Raises `Unsupported` where this ComfyUI is not one that remote models are made for."""
    from luna_broker.comfyui import compat

    against = compat.missing("remote")
    if against:
        message = f"{name} cannot be remote in this ComfyUI: it lacks {', '.join(against)}"
        raise refusal(Unsupported, message, "load it with mode local")
