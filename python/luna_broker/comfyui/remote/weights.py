"""Weights that are in the broker: here are only their names and shapes, until somebody reads them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.utils
import torch
from luna_broker import Client, Unsupported
from luna_broker.comfyui.files import Source
from luna_broker.comfyui.remote import refusals
from torch import Tensor

_LOG = logging.getLogger("luna_broker")

Header = Mapping[str, tuple[str, Sequence[int]]]
# From keys of a file to those of ComfyUI's module. It may split and turn tensors, and leaves what it is given.
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def described(header: Header) -> dict[str, Tensor]:
    """Tensors with types and shapes, and without values."""
    return {
        key: torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
        for key, (dtype, shape) in header.items()
    }


class FileWeights:
    """The weights of files, by the keys of ComfyUI's module."""

    def __init__(self, client: Client, sources: Sequence[Source], headers: Sequence[Header], convert: Convert) -> None:
        """`client`: of the broker that has the files. `convert` is given the tensors of each file by themselves."""
        self._client = client
        self._sources = sources
        self._convert = convert
        self._values: dict[str, Tensor] | None = None
        self.shapes: dict[str, torch.Size] = {}
        for header in headers:
            self.shapes.update({key: tensor.shape for key, tensor in convert(described(header)).items()})

    def __getitem__(self, key: str) -> Tensor:
        """A weight, in memory that is the broker's where that can be. Raises `LunaBrokerError`."""
        if self._values is None:
            self._values = {}
            for source in self._sources:
                self._values.update(self._convert(self._read(source)))
        return self._values[key]

    def metas(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors that stand for the weights. Each knows the way to its value, see `value`."""
        found = {}
        for key, shape in self.shapes.items():
            found[key] = torch.empty(shape, dtype=dtype or torch.float32, device="meta")
            found[key].luna_broker_value = (self, key)  # type: ignore[attr-defined]
        return found

    def _read(self, source: Source) -> dict[str, Tensor]:
        try:
            return dict(source.ask(lambda name: self._client.attach(name, progress=False)))
        except Unsupported:
            if source.path is None:
                raise
        # No memory is shared with that broker, but the file is.
        _LOG.warning(
            "luna-broker: reads %s into this process, as patches want its weights and they are not shared", source.name
        )
        return dict(comfy.utils.load_torch_file(source.path))


def value(tensor: Tensor) -> Tensor:
    """The values that a tensor of `FileWeights.metas` stands for; any other tensor as it is."""
    owner = getattr(tensor, "luna_broker_value", None)
    return tensor if owner is None else owner[0][owner[1]]


class Described(torch.nn.Module):
    """A module without parameters, whose state dict has those that the broker has in its place."""

    def __init__(self, weights: FileWeights, dtype: torch.dtype | None, prefix: str) -> None:
        """`prefix`: what the keys of `weights` begin with that this module's do not."""
        super().__init__()
        self.weights = weights
        self.dtype = dtype
        self._prefix = prefix

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = OrderedDict() if destination is None else destination
        for key, meta in self.weights.metas(self.dtype).items():
            destination[prefix + key.removeprefix(self._prefix)] = meta
        return destination

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        raise refusals.reading("The weights of this model")

    def _apply(self, fn: Any, recurse: bool = True) -> Described:
        # There is nothing to move or to convert, and tensors without values cannot be.
        return self
