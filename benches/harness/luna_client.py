"""Our own Python client as a peer: what a ComfyUI worker would do, timed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import luna_broker
import numpy
import torch

from .commands import Peer, answer_commands
from .sizes import Size

READY_SECONDS = 10.0


def connect_when_ready(address: str) -> Any:
    """A broker that was started a moment ago may not listen yet."""
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            return luna_broker.connect(address)
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


class LunaClient(Peer):
    # The broker promises marks, and nothing about the elements between them.
    patterned = False

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    def open(self) -> dict:
        self._client = connect_when_ready(self._address)
        return {
            "session": str(self._client.session),
            "forced_transport": os.environ.get("LUNA_BROKER_TRANSPORT"),
            "extension": getattr(luna_broker, "__version__", "unknown"),
        }

    def keeps_images(self, variant: str) -> bool:
        return variant != "one copy"

    def wrap(self, latent: numpy.ndarray) -> torch.Tensor:
        return torch.from_numpy(latent)

    def ping(self) -> Any:
        return self._client.ping()

    def exchange(self, variant: str, size: Size) -> Callable[[torch.Tensor], Any]:
        decode = self._client.vae(size.model).decode
        if variant != "one copy":
            return decode
        private = numpy.zeros(size.image_shape, numpy.float32)

        def copy_out(latent: torch.Tensor) -> numpy.ndarray:
            numpy.copyto(private, decode(latent).numpy())
            return private

        return copy_out


if __name__ == "__main__":
    answer_commands(LunaClient(sys.argv[1]))
