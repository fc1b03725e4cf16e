"""ComfyUI's ModelPatcher for a model whose weights are in the broker: patches become adapters of requests."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
from luna_broker.comfyui.remote import refusals
from luna_broker.comfyui.remote.runs import Runs
from luna_broker.comfyui.remote.stacks import Stacks
from luna_broker.comfyui.remote.weights import FileWeights

# Under which a patcher and its clones have their `Remote`.
ATTACHMENT = "luna_broker"

# Bytes of this process's memory. Not 0, which ComfyUI takes for unknown; so little that it evicts nothing for it.
SIZE = 1


class Remote:
    """What all patchers of one remote model share."""

    def __init__(self, weights: FileWeights, stacks: Stacks, runs: Runs | None = None) -> None:
        self.weights = weights
        self.stacks = stacks
        self.runs = runs


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose patches cross to the broker, where they are applied to nothing that others use."""

    @property
    def remote(self) -> Remote:
        """What this one and its clones share."""
        return self.attachments[ATTACHMENT]

    def patch_model(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> Any:
        # Before object patches take the place of what stands for the network.
        refusals.patcher(self)
        return super().patch_model(device_to, lowvram_model_memory, load_weights, force_patch_weights)

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        refusals.patcher(self)
        self._activate(None)
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)

    def pre_run(self) -> None:
        self._close_runs()
        super().pre_run()

    def cleanup(self) -> None:
        super().cleanup()
        self._close_runs()

    def patch_hooks(self, hooks: Any) -> None:
        """Has the next requests name the patches together with those of `hooks`, at the strengths they have now."""
        self._activate(hooks)
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self._activate(None)
        self.current_hooks = None

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """Weights with their patches, for another model to be merged with: in memory that is the broker's."""
        weights = self.remote.weights
        found = {}
        for key, own in self.model_state_dict(filter_prefix).items():
            weight = weights[key] if key in weights.shapes else own
            found[key] = [(weight, lambda weight, **_: weight), *self.patches.get(key, [])]
        return found

    def _activate(self, hooks: Any) -> None:
        if ATTACHMENT not in self.attachments:
            return
        patches = self.patches
        strengths: tuple[Any, ...] = ()
        if hooks is not None:
            registered = [hook for hook in hooks.hooks if hook.hook_ref in self.hook_patches]
            strengths = tuple((hook.hook_ref, hook.strength) for hook in registered)
            of_hooks = self.get_combined_hook_patches(hooks)
            # In an order that is always the same, so that equal sets are uploaded as equal ones.
            keys = dict.fromkeys([*patches, *of_hooks])
            patches = {key: [*patches.get(key, []), *of_hooks.get(key, [])] for key in keys}
        self.remote.stacks.activate((self.patches_uuid, strengths), patches)

    def _close_runs(self) -> None:
        if self.remote.runs is not None:
            self.remote.runs.close()
