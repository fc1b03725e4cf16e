"""A worker that samples with SDXL's UNet, told by lines on its input what to do next.

It holds the broker's weights, or its own, and computes itself; or it has the broker compute. It says what came of each
line, and stays until its input ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hand_offs import said, synchronize
from sdxl_scene import Given, Scene, arguments
from sdxl_unet import PREFIX, bare

ATTACHED, REMOTE, PRIVATE = "attached to the broker's weights", "the broker computes", "a copy of its own"
STEPS = 3
# How a GPU's libraries say that there is no memory left.
NO_MEMORY = ("out of memory", "alloc_failed", "allocation_failed", "status_not_initialized")

Step = Callable[..., torch.Tensor]


class Worker:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen, self._scene = chosen, Scene(chosen)
        self._step: Step | None = None
        self._given: Given | None = None

    def load(self) -> dict:
        began = time.perf_counter()
        self._given = self._scene.given()
        ways = {ATTACHED: self._attached, REMOTE: self._remote, PRIVATE: self._scene.own_unet}
        self._step = ways[self._chosen.kind]()
        synchronize(self._scene.place)
        return {"seconds": round(time.perf_counter() - began, 3)}

    def _attached(self) -> Step:
        from luna_broker.torch import load_attached

        unet = bare(self._scene.sizes, self._scene.dtype)
        path, place = self._scene.unet, self._scene.place
        load_attached(unet, path, client=self._client(), prefix=PREFIX, dtype=self._scene.dtype, device=place)
        return unet

    def _remote(self) -> Step:
        client = self._client()
        # Else it would be loaded with the first step.
        client.load(str(self._scene.unet))
        return client.unet(self._scene.unet)

    def _client(self):
        import luna_broker

        return luna_broker.connect(self._chosen.socket, timeout=120)

    def run(self) -> dict:
        """A few steps; what they came to is in the file then."""
        x, _, context, y = self._given
        times = []
        for at in range(STEPS):
            began = time.perf_counter()
            timesteps = torch.full((len(x),), 900.0 - 300 * at, device=x.device)
            x = x + 0.5 * self._step(x, timesteps, context, y)
            synchronize(self._scene.place)
            times.append(round(time.perf_counter() - began, 4))
        x.float().cpu().numpy().tofile(self._chosen.result)
        return {"seconds": times}


def is_no_memory(error: Exception) -> bool:
    words = said(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(word in words for word in NO_MEMORY)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--kind", choices=[ATTACHED, REMOTE, PRIVATE], required=True)
    parser.add_argument("--socket", default="")
    parser.add_argument("--result", type=Path, required=True)
    worker = Worker(parser.parse_args())
    # Torch is there, a context on the GPU is not: that is part of what loading takes.
    print(json.dumps({"is_ready": True}), flush=True)
    for line in sys.stdin:
        try:
            found = {"load": worker.load, "run": worker.run}[line.strip()]()
        except Exception as error:
            found = {"error": said(error)[:600], "is_no_memory": is_no_memory(error)}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
