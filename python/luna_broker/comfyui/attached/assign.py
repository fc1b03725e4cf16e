"""What makes ComfyUI's loaders use tensors as they are instead of copying them: for as long as one loader runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from luna_broker.comfyui.attached.audit import Span, lies_in
from luna_broker.comfyui.attached.patcher import AttachedPatcher
from torch.nn import Module, Parameter


@contextmanager
def attaching(spans: Sequence[Span], cast_later: frozenset[int] = frozenset()) -> Iterator[None]:
    """Inside, models that this thread builds have the tensors in `spans` as parameters, and `AttachedPatcher`s.

    `cast_later`: ids of tensors that are in another type than the module was built in, and that ComfyUI would cast
    the module to afterwards: a VAE's.
    """
    original = Module.load_state_dict
    patcher = comfy.model_patcher.ModelPatcher
    initial_device = mm.unet_inital_load_device
    thread = threading.get_ident()

    def load_state_dict(
        module: Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        # ComfyUI's loaders are not strict. Who is, or is on another thread, is somebody else.
        if strict or assign or threading.get_ident() != thread:
            return original(module, state_dict, strict, assign)
        given = _give(module, state_dict, spans, cast_later)
        rest = {key: tensor for key, tensor in state_dict.items() if key not in given}
        found = original(module, rest, strict=False)
        return type(found)([key for key in found.missing_keys if key not in given], found.unexpected_keys)

    Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    comfy.model_patcher.ModelPatcher = AttachedPatcher
    # Modules are built in host memory that nobody touches: building them on the GPU would take that of the weights.
    mm.unet_inital_load_device = lambda parameters, dtype: torch.device("cpu")
    try:
        yield
    finally:
        Module.load_state_dict = original  # type: ignore[method-assign]
        comfy.model_patcher.ModelPatcher = patcher
        mm.unet_inital_load_device = initial_device


def _give(
    module: Module, state_dict: Mapping[str, Any], spans: Sequence[Span], cast_later: frozenset[int]
) -> frozenset[str]:
    """Puts what fits in place of the module's own parameters, and says what that was.

    What differs in type or shape is left to the loader, which copies it as ever: the result is right then, and the
    audit finds it. Buffers are left too, as modules may write to them.
    """
    given = []
    for name, own in list(module.named_parameters()):
        tensor = state_dict.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != own.shape or not lies_in(tensor, spans):
            continue
        if tensor.dtype != own.dtype and id(tensor) not in cast_later:
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, Parameter(tensor, requires_grad=False))
        given.append(name)
    return frozenset(given)
