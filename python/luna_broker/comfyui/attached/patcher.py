"""ComfyUI's ModelPatcher for weights that are not this process's: never copied, moved, offloaded or written to.

Overridden is what would do any of that. A patched weight is memory of this process, or a set that a worker has merged
before, and what was there before is kept by reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight, string_to_seed
from luna_broker.comfyui.attached.merged import MergedSets
from luna_broker.comfyui.attached.reattach import Renewal

# Under which a patcher and its clones have their `Holding`.
ATTACHMENT = "luna_broker"


@dataclass
class Holding:
    """What a model and all patchers of it share."""

    renewal: Renewal
    sets: MergedSets
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights that are patched and shared: those of the set that is loaded."""
    views_of: Any = None
    """Which patches these are: a patcher's `patches_uuid`."""


class Kept(NamedTuple):
    """A weight before it was patched, as ComfyUI keeps it."""

    weight: torch.Tensor
    inplace_update: bool = False


class AttachedPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model has the broker's weights."""

    def __init__(
        self, model: Any, load_device: Any, offload_device: Any, size: int = 0, weight_inplace_update: bool = False
    ) -> None:
        # Where both devices are one, what ComfyUI calls a copy or a move is neither: there the weights are.
        super().__init__(model, load_device, load_device, size)

    @property
    def holding(self) -> Holding | None:
        """`None` until the loader is done."""
        return getattr(self, "attachments", {}).get(ATTACHMENT)

    def model_size(self) -> int:
        """Bytes that loading this takes of this process's memory. Never 0, which ComfyUI takes for unknown."""
        return 1 + sum(self._private_bytes(key) for key in self.patches)

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        # Before each use, and by the thread that is going to use it.
        if self.holding is not None:
            self.holding.renewal.renew()
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        holding = self.holding
        if holding is not None and holding.views_of != self.patches_uuid:
            holding.views = holding.sets.find(self.patches, self.patches_uuid) if self.patches else {}
            holding.views_of = self.patches_uuid
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
        if holding is not None and self.patches and not holding.views:
            self._share(holding)

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        view = self._view(key)
        if view is None:
            super().patch_weight_to_device(key, device_to=device_to, inplace_update=False)
        elif key in self.patches:
            self.backup.setdefault(key, Kept(comfy.utils.get_attr(self.model, key)))
            comfy.utils.set_attr_param(self.model, key, view)

    def patch_hook_weight_to_device(
        self,
        hooks: Any,
        combined_patches: Mapping[str, Any],
        key: str,
        original_weights: dict[str, Any],
        memory_counter: Any,
    ) -> None:
        """As ComfyUI's, with a new parameter where that writes into the one there is."""
        if key not in combined_patches:
            return
        weight, set_weight, convert = get_key_weight(self.model, key)
        self._keep_for_hooks(key)
        working = weight.to(torch.float32, copy=True)
        if convert is not None:
            working = convert(working, inplace=True)
        patched = comfy.lora.calculate_weight(combined_patches[key], working, key, original_weights=original_weights)
        del original_weights[key]
        if set_weight is None:
            rounded = comfy.float.stochastic_rounding(patched, weight.dtype, seed=string_to_seed(key))
            comfy.utils.set_attr_param(self.model, key, rounded)
        else:
            set_weight(patched, inplace_update=False, seed=string_to_seed(key))
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            # The parameter itself: patched weights and what is kept of them for the next step are one memory.
            now = comfy.utils.get_attr(self.model, key)
            self.cached_hook_patches.setdefault(hooks, {})[key] = (now, now.device)

    def patch_cached_hook_weights(self, cached_weights: Mapping[str, Any], key: str, memory_counter: Any) -> None:
        self._keep_for_hooks(key)
        comfy.utils.set_attr_param(self.model, key, cached_weights[key][0])

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        with self.use_ejected():
            for key in [key for key in self.hook_backup if not whitelist_keys_set or key in whitelist_keys_set]:
                comfy.utils.set_attr_param(self.model, key, self.hook_backup.pop(key)[0])
            if not self.hook_backup:
                self.current_hooks = None

    def _load_list(self) -> list[tuple[Any, ...]]:
        """Modules with the bytes that patching them takes, where ComfyUI has those of all their weights."""
        return [
            (sum(self._private_bytes(f"{name}.{parameter}") for parameter in parameters), name, module, parameters)
            for _, name, module, parameters in super()._load_list()
        ]

    def _keep_for_hooks(self, key: str) -> None:
        if key not in self.hook_backup:
            weight = comfy.utils.get_attr(self.model, key)
            self.hook_backup[key] = (weight, weight.device)

    def _view(self, key: str) -> torch.Tensor | None:
        holding = self.holding
        return None if holding is None or holding.views_of != self.patches_uuid else holding.views.get(key)

    def _private_bytes(self, key: str) -> int:
        if key not in self.patches or self._view(key) is not None:
            return 0
        weight = comfy.utils.get_attr(self.model, key)
        return int(weight.numel() * weight.element_size())

    def _share(self, holding: Holding) -> None:
        """Publishes what was merged just now, and takes the views on it in its place."""
        if any(key not in self.backup for key in self.patches):
            # Part of it is patched on the fly, as memory was short: there is nothing whole to publish.
            return
        merged = {key: self._merged(key) for key in self.patches}
        holding.views = holding.sets.publish(merged, self.patches, self.patches_uuid)
        for key, view in holding.views.items():
            if key in self.hook_backup:
                self.hook_backup[key] = (view, view.device)
            else:
                comfy.utils.set_attr_param(self.model, key, view)
        if holding.views:
            self.model.model_loaded_weight_memory = self.model_size()

    def _merged(self, key: str) -> torch.Tensor:
        """A merged weight: where a hook has patched it further by now, what was there before."""
        kept = self.hook_backup.get(key)
        return comfy.utils.get_attr(self.model, key) if kept is None else kept[0]
