"""What cannot be remote, each said in words that name the patch and the way out. Knows no ComfyUI.

A refusal leaves the model usable: the next prompt without the patch works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from luna_broker import LunaBrokerError, Unsupported
from luna_broker.errors import refusal

ATTACHED = "load the model with mode attached, where this ComfyUI runs the network itself, or leave the patch out"

# What an object patch must not replace: the module that stands for the broker's network.
NETWORK = "diffusion_model"

TORCH_COMPILE = "torch.compile"


def options(transformer_options: Mapping[str, Any]) -> None:
    """Raises `Unsupported` where a call's options have patches that reach into the network."""
    for name, patches in transformer_options.get("patches", {}).items():
        if patches:
            raise _patch(name, patches)
    for name, replacements in transformer_options.get("patches_replace", {}).items():
        if replacements:
            raise _patch(f"replacement of {name}", replacements.values())
    override = transformer_options.get("optimized_attention_override")
    if override is not None:
        raise _patch("optimized_attention_override", [override])


def patcher(patched: Any) -> None:
    """Raises `Unsupported` where a ModelPatcher replaces, wraps or rewires what is not in this process."""
    for name in patched.object_patches:
        if name == NETWORK or name.startswith(f"{NETWORK}."):
            kind = type(patched.object_patches[name]).__name__
            raise _refused(f"the object patch on {name} ({kind}, which is what torch.compile nodes set)")
    for wrappers in patched.wrappers.values():
        if wrappers.get(TORCH_COMPILE):
            raise _refused(f"the wrapper {TORCH_COMPILE}")
    for name, functions in patched.weight_wrapper_patches.items():
        raise _refused(f"the weight wrapper on {name}{_by(functions)}")
    for name, injections in patched.injections.items():
        raise _refused(f"the injection {name!r}{_by(injections or ())}")


def weight_patch(key: str, what: str) -> LunaBrokerError:
    """A patch of a weight that the broker has no adapter for."""
    return _refused(f"the patch of {key}: {what}")


def reading(what: str) -> LunaBrokerError:
    """Something wants the weights themselves: `what` names them."""
    message = (
        f"{what} are in the broker, and something here reads them: saving, extracting a LoRA and Control-LoRA do."
        " Nothing was computed"
    )
    return refusal(Unsupported, message, "load the model with mode attached or local for that")


def _patch(name: str, functions: Iterable[Any]) -> LunaBrokerError:
    return _refused(f"the patch {name}{_by(functions)}")


def _refused(what: str) -> LunaBrokerError:
    message = f"the model runs in the broker, which {what} cannot reach; nothing was computed"
    return refusal(Unsupported, message, ATTACHED)


def _by(functions: Iterable[Any]) -> str:
    """Where functions come from, to find the node by."""
    names = dict.fromkeys(_name(function) for function in functions)
    return f" (set by {', '.join(names)})" if names else ""


def _name(function: Callable[..., Any] | object) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    # Of a function within a node's method, the node's class is all that a user knows.
    return f"{named.__module__}.{named.__qualname__.split('.')[0]}"
