"""Adapters that a broker was given: each crosses once, whoever needs it and however often."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from luna_broker import Client
from torch.utils.weak import WeakTensorKeyDictionary

# Sets that this process keeps the broker from giving up. An older one is sent anew where it was given up.
MOST_HELD = 32

PREFIX = "comfyui-patches-"


class Uploads:
    """The sets of one broker, as one worker sees them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: OrderedDict[str, Any] = OrderedDict()
        # Nodes keep a file's tensors, and apply them with ever other strengths.
        self._digests = WeakTensorKeyDictionary()

    def publish(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """The name of a set with these tensors, which the broker has from now on.

        Raises as `Client.publish`.
        """
        name = PREFIX + self._digest(tensors)
        if name not in self._held:
            self._held[name] = self._client.publish(name, tensors)
        self._held.move_to_end(name)
        while len(self._held) > MOST_HELD:
            self._held.popitem(last=False)
        return name

    def forget(self) -> None:
        """Forgets what was sent: the broker was restarted."""
        self._held.clear()

    def _digest(self, tensors: Mapping[str, torch.Tensor]) -> str:
        digest = hashlib.blake2b(digest_size=20)
        for key in sorted(tensors):
            digest.update(key.encode() + b"\0")
            digest.update(self._digest_of(tensors[key]))
        return digest.hexdigest()

    def _digest_of(self, tensor: torch.Tensor) -> bytes:
        known = self._digests.get(tensor)
        if known is None:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=20)
            digest.update(content.numpy().data)
            known = self._digests[tensor] = digest.digest()
        return known
