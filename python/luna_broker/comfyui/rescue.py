"""Models whose broker goes away while they are used: the call is done again, by a model of this process's own.

Only where the loader's `on_failure` is "local". What a broker refuses, a patch say, is no failure, and stays an error.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from luna_broker import Busy, ConnectionLost, LunaBrokerError, ShuttingDown, Stale, Timeout
from luna_broker.comfyui import notices
from luna_broker.comfyui.loaded import Loaded

FAILURES = (ConnectionLost, ShuttingDown, Stale, Timeout, Busy)

KEY = "luna_broker_rescue"


class Rescue:
    """Loads a model's local twin once it is needed. Shared by all parts of a checkpoint."""

    def __init__(self, name: str, load: Callable[[], Loaded]) -> None:
        self._name = name
        self._load = load

    @functools.cached_property
    def twin(self) -> Loaded:
        """The same files, loaded by this process. Raises where it cannot read them."""
        return self._load()

    def tell(self, error: LunaBrokerError) -> None:
        """Says why what runs now goes on locally."""
        notices.tell(None, f"{self._name} goes on local, from here: {error}", warning=True)


def protect(loaded: Loaded, rescue: Rescue) -> Loaded:
    """Has the calls of models done again locally where the broker that they rely on fails."""
    if loaded.model is not None:
        sample = functools.partial(_sample, rescue)
        loaded.model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
    if loaded.clip is not None:
        _become(loaded.clip, _Encoding, rescue)
    if loaded.vae is not None:
        _become(loaded.vae, _Coding, rescue)
    return loaded


def _sample(rescue: Rescue, executor: Any, *arguments: Any, **options: Any) -> Any:
    """Around a whole sampling run: it begins anew, as a sampler's state cannot be taken back by one step."""
    guider = executor.class_obj
    try:
        return executor(*arguments, **options)
    except FAILURES as error:
        lost = guider.model_patcher
        guider.model_patcher = _local_patcher(lost, rescue, "model", error)
        guider.model_options = guider.model_patcher.model_options
    try:
        return guider.sample(*arguments, **options)
    finally:
        # The run that failed ends too, and puts these away.
        guider.model_patcher = lost
        guider.conds = {}


class _Encoding:
    """Beside the class of a CLIP."""

    luna_rescue: Rescue

    def clone(self) -> Any:
        copy = super().clone()  # type: ignore[misc]
        copy.__class__ = type(self)
        copy.luna_rescue = self.luna_rescue
        return copy

    def encode_from_tokens(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().encode_from_tokens(*arguments, **options)  # type: ignore[misc]
        except FAILURES as error:
            return self._local(error).encode_from_tokens(*arguments, **options)

    def encode_from_tokens_scheduled(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().encode_from_tokens_scheduled(*arguments, **options)  # type: ignore[misc]
        except FAILURES as error:
            return self._local(error).encode_from_tokens_scheduled(*arguments, **options)

    def _local(self, error: LunaBrokerError) -> Any:
        twin = self.luna_rescue.twin.clip.clone()
        twin.patcher = _local_patcher(self.patcher, self.luna_rescue, "clip", error)  # type: ignore[attr-defined]
        for option in ("layer_idx", "tokenizer_options", "use_clip_schedule", "apply_hooks_to_conds"):
            setattr(twin, option, getattr(self, option))
        return twin


class _Coding:
    """Beside the class of a VAE."""

    luna_rescue: Rescue

    def _again(self, operation: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            return getattr(super(), operation)(*arguments, **options)
        except FAILURES as error:
            self.luna_rescue.tell(error)
        return getattr(self.luna_rescue.twin.vae, operation)(*arguments, **options)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return self._again("decode", arguments, options)

    def encode(self, *arguments: Any, **options: Any) -> Any:
        return self._again("encode", arguments, options)

    def decode_tiled(self, *arguments: Any, **options: Any) -> Any:
        return self._again("decode_tiled", arguments, options)

    def encode_tiled(self, *arguments: Any, **options: Any) -> Any:
        return self._again("encode_tiled", arguments, options)


def _become(thing: Any, beside: type, rescue: Rescue) -> None:
    thing.__class__ = type(type(thing).__name__, (beside, type(thing)), {"__module__": type(thing).__module__})
    thing.luna_rescue = rescue


def _local_patcher(lost: Any, rescue: Rescue, part: str, error: LunaBrokerError) -> Any:
    """The local model with the patches of the broker's. Raises `error` where those are of weights that are not here."""
    if any(_lacks_values(value) for patches in lost.patches.values() for value in patches):
        raise error
    rescue.tell(error)
    twin = getattr(rescue.twin, part)
    local = (twin.patcher if part == "clip" else twin).clone()
    local.patches = {key: list(patches) for key, patches in lost.patches.items()}
    local.patches_uuid = uuid.uuid4()
    local.model_options = comfy.model_patcher.create_model_options_clone(lost.model_options)
    local.object_patches = dict(lost.object_patches)
    for kind, wrappers in lost.wrappers.items():
        local.wrappers[kind] = {key: list(each) for key, each in wrappers.items() if key != KEY}
    for kind, callbacks in lost.callbacks.items():
        local.callbacks[kind] = {key: list(each) for key, each in callbacks.items()}
    local.injections = {key: list(each) for key, each in lost.injections.items()}
    local.additional_models = {key: list(each) for key, each in lost.additional_models.items()}
    local.hook_patches = comfy.model_patcher.create_hook_patches_clone(lost.hook_patches)
    local.forced_hooks = lost.forced_hooks.clone() if lost.forced_hooks else None
    local.hook_mode = lost.hook_mode
    return local


def _lacks_values(value: Any) -> bool:
    """Whether a patch holds tensors without values: those of a remote model that was merged into this one."""
    if isinstance(value, torch.Tensor):
        return value.device.type == "meta"
    if isinstance(value, (tuple, list)):
        return any(_lacks_values(each) for each in value)
    return hasattr(value, "weights") and _lacks_values(value.weights)
