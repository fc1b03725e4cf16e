"""From patches to the adapters that a request names: uploaded once, and again after the broker has lost them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import comfy.lora
import torch
from luna_broker import Client, ModelNotFound
from luna_broker.comfyui.remote import origins, patches, refusals
from luna_broker.comfyui.remote.patches import Patches
from luna_broker.comfyui.remote.runs import Stack
from luna_broker.comfyui.remote.uploads import Uploads
from luna_broker.comfyui.remote.weights import FileWeights, value

Answer = TypeVar("Answer")

# Sets of patches of one model that are remembered: two of each conditioning with hooks, and some of before.
MOST = 16


class Stacks:
    """The sets of patches of one model, of which one is active at a time."""

    def __init__(self, client: Client, weights: FileWeights, dtype: torch.dtype | None) -> None:
        """`client`: of the broker that runs the model. `dtype`: of weights that are merged here."""
        self._uploads = Uploads(client)
        self._weights = weights
        self._dtype = dtype
        self._known: OrderedDict[Hashable, Stack] = OrderedDict()
        self._active: tuple[Hashable, Patches] = (None, {})
        # Until it turns out that the broker does not read the files that this process reads.
        self._names_files = True

    def activate(self, identity: Hashable, of_model: Patches) -> None:
        """Has the requests from now on name these patches. Uploads nothing yet. `identity`: equal for equal ones."""
        self._active = (identity, of_model)

    def ask(self, question: Callable[[Stack], Answer]) -> Answer:
        """The answer to a request that names the active patches."""
        try:
            return question(self._stack())
        except ModelNotFound:
            identity, of_model = self._active
            if not of_model:
                raise
        # After a restart, and after others needed the room, it is all sent once more; of files there is no telling.
        self._known.clear()
        self._uploads.forget()
        self._names_files = False
        return question(self._stack())

    def _stack(self) -> Stack:
        identity, of_model = self._active
        if identity not in self._known or identity is None:
            self._known[identity] = self._make(of_model) if of_model else ()
        self._known.move_to_end(identity)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return self._known[identity]

    def _make(self, of_model: Patches) -> Stack:
        weights = patches.Weights(self._weights.shapes.__getitem__, self._weights.__getitem__, self._merge)
        made = patches.adapters(of_model, weights)
        return tuple((self._name(adapter), adapter.strength) for adapter in made)

    def _name(self, adapter: patches.Adapter) -> str:
        file = origins.file_of(adapter.tensors) if self._names_files else None
        return file or self._uploads.publish(adapter.tensors)

    def _merge(self, of_key: Sequence[patches.Patch], original: torch.Tensor, key: str) -> torch.Tensor:
        """As ComfyUI merges where it has the weight, and rounded to the element type that it would have."""
        valued = [(patch[0], _valued(patch[1]), *patch[2:]) for patch in of_key]
        weight = original.to(torch.float32, copy=True)
        originals = {key: [(original, lambda weight, **_: weight)]}
        merged = comfy.lora.calculate_weight(valued, weight, key, original_weights=originals)
        return merged.to(self._dtype or original.dtype)


def check(taken: Sequence[Mapping[str, Any]]) -> None:
    """Raises `Unsupported`, naming the first key, where a model took up an adapter only in part."""
    for adapter in taken:
        if adapter["unknown_keys"]:
            first = adapter["unknown"][0] if adapter["unknown"] else "some"
            raise refusals.weight_patch(str(first), "the broker has no adapters for that layer")


def _valued(patch: Any) -> Any:
    """A patch's value with the weights of remote models in the place of what stands for them."""
    if isinstance(patch, torch.Tensor):
        return value(patch)
    if isinstance(patch, (tuple, list)):
        return type(patch)(_valued(each) for each in patch)
    return patch
