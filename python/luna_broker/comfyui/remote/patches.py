"""Patches of a ModelPatcher as adapters that the broker reads. Knows no ComfyUI, only the shape of what it keeps.

The broker applies adapters one after the other, each with one strength and with at most one change of a layer. Patches
of a layer keep their order, each has the first adapter that it can have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from luna_broker.comfyui.remote import origins, refusals

_LOG = logging.getLogger("luna_broker")

Tensor = torch.Tensor
# Strength, value, strength of what was there, part of the weight, function: as ComfyUI keeps it.
Patch = tuple[float, Any, float, Any, Any]
Patches = Mapping[str, Sequence[Patch]]

# What adapters may be stored in.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# What the broker's names of layers begin with, by what ComfyUI's begin with.
TEXT_ENCODERS = ("clip_l.", "clip_g.", "clip_h.")

# The parts of each kind of adapter, in the order in which ComfyUI has them; "alpha" is a number.
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "reshape"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": (
        *("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        "dora_scale",
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha", "dora_scale"),
    # ComfyUI reads the rescale of an OFT and does nothing with it.
    "oft": ("oft_blocks", "", "alpha", "dora_scale"),
    "boft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
}


@dataclass
class Adapter:
    """What is sent as one adapter."""

    strength: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By keys as the broker reads them in files."""
    origin: str | None = None
    """The file that all of it is of: others do not go with it, so that the file's name may stand for it."""
    changed: set[tuple[str, bool]] = field(default_factory=set)
    """Layers of which it changes the weight, and those of which it changes the bias."""


@dataclass(frozen=True)
class Weights:
    """The weights that are patched, for what the broker has no adapter for."""

    shape: Callable[[str], torch.Size]
    read: Callable[[str], Tensor]
    """Raises where they cannot be had."""
    merge: Callable[[Sequence[Patch], Tensor, str], Tensor]
    """Computes patches as ComfyUI does."""


def adapters(patches: Patches, weights: Weights) -> list[Adapter]:
    """The adapters that have the effect of these patches, in the order in which they are to be applied.

    Raises `Unsupported`, naming the patch, for what neither an adapter nor merging beforehand can do.
    """
    stack: list[Adapter] = []
    for key, of_key in patches.items():
        layer, is_bias = _layer(key)
        wanted = [patch for patch in of_key if _acts(patch, key, weights)]
        if not wanted:
            continue
        changes = [_change(patch, layer, is_bias) for patch in wanted]
        if any(change is None for change in changes):
            _place(stack, 0, layer, is_bias, 1.0, _merged(wanted, key, layer, is_bias, weights))
            continue
        after = 0
        for patch, change in zip(wanted, changes, strict=True):
            strength = 1.0 if _is_set(patch[1]) else float(patch[0])
            # Sums of biases have no order.
            after = _place(stack, 0 if is_bias else after, layer, is_bias, strength, change or {})
    return stack


def _place(
    stack: list[Adapter], after: int, layer: str, is_bias: bool, strength: float, tensors: Mapping[str, Tensor]
) -> int:
    """Adds a change to the first adapter from `after` on that has room for it; gives the place behind that."""
    origin = origins.of(tensors)
    for at in range(after, len(stack)):
        if (stack[at].strength, stack[at].origin) == (strength, origin) and (layer, is_bias) not in stack[at].changed:
            break
    else:
        at = len(stack)
        stack.append(Adapter(strength, origin=origin))
    stack[at].changed.add((layer, is_bias))
    stack[at].tensors.update(tensors)
    return at + 1


def _layer(key: str) -> tuple[str, bool]:
    """What the broker calls the layer of a weight, and whether it is the layer's bias."""
    stem, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        raise refusals.weight_patch(key, "the broker changes weights and biases of layers only")
    return f"text_encoders.{stem}" if stem.startswith(TEXT_ENCODERS) else stem, parameter == "bias"


def _acts(patch: Patch, key: str, weights: Weights) -> bool:
    """Whether ComfyUI would change anything because of a patch. What it would leave out with a warning, it says so."""
    strength, value, strength_model, offset, _ = patch
    if strength_model != 1.0 or isinstance(value, list) or _is_set(value):
        return True
    if strength == 0.0:
        return False
    if getattr(value, "name", None) == "boft" and value.weights[2] is None:
        _LOG.warning("luna-broker: the BOFT of %s has no alpha; it is left out, as ComfyUI does", key)
        return False
    difference = _difference(value)
    if difference is not None and offset is None and not _pads(value) and difference.shape != weights.shape(key):
        sizes = f"{tuple(difference.shape)} instead of {tuple(weights.shape(key))}"
        _LOG.warning("luna-broker: the difference of %s is left out, as its shape is %s", key, sizes)
        return False
    return True


def _change(patch: Patch, layer: str, is_bias: bool) -> dict[str, Tensor] | None:
    """A patch in keys of the broker's; `None` where it has none for it."""
    _, value, strength_model, offset, function = patch
    if strength_model != 1.0 or offset is not None or function is not None or isinstance(value, list):
        return None
    if hasattr(value, "weights"):
        return None if is_bias else _adapter(value, layer)
    if _is_set(value):
        return None if is_bias else {f"{layer}.set_weight": _sent(value[1][0])}
    difference = _difference(value)
    if difference is None or _pads(value):
        return None
    return {f"{layer}.{'diff_b' if is_bias else 'diff'}": _sent(difference)}


def _adapter(value: Any, layer: str) -> dict[str, Tensor] | None:
    names = KINDS.get(value.name)
    if names is None or len(names) != len(value.weights):
        return None
    parts = {name: part for name, part in zip(names, value.weights, strict=True) if name and part is not None}
    if "reshape" in parts or (value.name in ("oft", "boft") and "dora_scale" in parts):
        return None
    alpha = parts.pop("alpha", None)
    tensors = {f"{layer}.{name}": _sent(part) for name, part in parts.items()}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor([float(alpha)], dtype=torch.float32)
    return tensors


def _merged(wanted: Sequence[Patch], key: str, layer: str, is_bias: bool, weights: Weights) -> dict[str, Tensor]:
    """The result of patches, computed here, as a change that needs nothing else."""
    original = weights.read(key)
    result = weights.merge(wanted, original, key)
    if result.shape != original.shape:
        raise refusals.weight_patch(key, f"it makes {tuple(result.shape)} of {tuple(original.shape)}")
    if is_bias:
        return {f"{layer}.diff_b": result.float() - original.float()}
    return {f"{layer}.set_weight": _sent(result)}


def _is_set(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "set"


def _difference(value: Any) -> Tensor | None:
    """The tensor that is added; `None` for what is no difference, or one without a tensor."""
    if not isinstance(value, tuple):
        return None
    if len(value) == 1:
        return value[0]
    return value[1][0] if value[0] == "diff" else None


def _pads(value: Any) -> bool:
    """Whether a difference may be larger than the weight."""
    more = value[1][1:] if isinstance(value, tuple) and len(value) == 2 else ()
    return bool(more) and bool(more[0].get("pad_weight"))


def _sent(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in FLOATS else tensor.float()
