"""Weights with a stack of LoRAs merged into them, which workers share: the first one merges, the others attach.

A set is named by everything that its bytes depend on: the weights, the patches with their order and strengths, and what
computes. Equal names are equal bytes, so that nobody needs to compare them.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from luna_broker import Client, LunaBrokerError, ModelNotFound

_LOG = logging.getLogger("luna_broker")

# Of looking for a set and of publishing one, copy included; a worker that waits longer works with its own.
DEADLINE_S = 60.0

Patches = Mapping[str, Sequence[tuple[Any, ...]]]


class NotShared(ValueError):
    """Patches whose result nobody else could name: they hold functions, or whole other models."""


def name_of(base: str, patches: Patches, computed_by: str) -> str:
    """The name of a set. `base`: digest of the weights; `computed_by`: what else the bytes depend on.

    Raises `NotShared`.
    """
    digest = hashlib.sha256()
    _feed(digest.update, (base, computed_by))
    for key in sorted(patches):
        _feed(digest.update, key)
        for strength, value, strength_model, offset, function in patches[key]:
            if function is not None or isinstance(value, list):
                raise NotShared(key)
            _feed(digest.update, (float(strength), float(strength_model), offset, value))
    return f"comfyui-merged-{digest.hexdigest()}"


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    """Each value begins with its kind and length: no two different ones give the same bytes."""
    if isinstance(value, torch.Tensor):
        _feed(update, (str(value.dtype), list(value.shape)))
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, (tuple, list)):
        update(b"s" + struct.pack("<q", len(value)))
        for each in value:
            _feed(update, each)
    elif isinstance(value, dict):
        _feed(update, sorted(value.items()))
    elif isinstance(value, (str, bool, int, float, type(None))):
        written = repr(value).encode()
        update(b"v" + struct.pack("<q", len(written)) + written)
    elif hasattr(value, "weights") and hasattr(value, "calculate_weight"):
        kind = type(value)
        _feed(update, (f"{kind.__module__}.{kind.__qualname__}", value.weights))
    else:
        raise NotShared(type(value).__name__)


class MergedSets:
    """The sets of one model, as one worker sees them."""

    def __init__(self, client: Client, base: str, device: torch.device, computed_by: str) -> None:
        """`base`: digest of the weights. `computed_by`: versions and device, of which the bytes of a merge depend."""
        self._client = client
        self._base = base
        self._device = None if device.type == "cpu" else str(device)
        self._computed_by = computed_by
        # A name takes reading all patches once.
        self._named: tuple[Any, str | None] = (None, None)

    def find(self, patches: Patches, uuid: Any) -> dict[str, torch.Tensor]:
        """Views on the weights that somebody has merged before, by key; nothing where nobody has."""
        name = self._name(patches, uuid)
        if name is None:
            return {}
        try:
            found = self._client.attach(name, device=self._device, progress=False, timeout=DEADLINE_S)
        except ModelNotFound:
            return {}
        except LunaBrokerError as error:
            _LOG.info("luna-broker: merges for itself, as what others have merged cannot be had: %s", error)
            return {}
        views = dict(found)
        if views.keys() != patches.keys():
            return {}
        _LOG.info("luna-broker: takes %d patched weights that another worker has merged", len(views))
        return views

    def publish(self, merged: Mapping[str, torch.Tensor], patches: Patches, uuid: Any) -> dict[str, torch.Tensor]:
        """Gives others what was merged here; returns views on it, which take its place. Nothing where that fails."""
        name = self._name(patches, uuid)
        if name is None:
            return {}
        try:
            views = dict(self._client.publish(name, merged, timeout=DEADLINE_S))
            if self._device is not None:
                views = dict(self._client.attach(name, device=self._device, progress=False, timeout=DEADLINE_S))
        except LunaBrokerError as error:
            _LOG.info("luna-broker: keeps %d patched weights to itself: %s", len(merged), error)
            return {}
        return views

    def _name(self, patches: Patches, uuid: Any) -> str | None:
        if self._named[0] != uuid:
            try:
                self._named = (uuid, name_of(self._base, patches, self._computed_by))
            except NotShared as why:
                _LOG.debug("luna-broker: patched weights are not shared: %s", why)
                self._named = (uuid, None)
        return self._named[1]
