"""A worker with a UNet: weights of its own, or the broker's."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import luna_broker
import torch
from luna_broker.torch import load_attached
from safetensors.torch import load_file

from . import unet
from .luna_client import connect_when_ready

WARM_FORWARDS = 3


class Worker:
    def __init__(self) -> None:
        self._module: Any = None
        self._client: luna_broker.Client | None = None
        self._dtype = torch.float16

    def do_write(self, path: str, quick: bool) -> dict:
        unet.write(Path(path), quick)
        return {}

    def do_ready(self, address: str | None) -> dict:
        """What a worker is before it has a model: libraries are loaded, the broker is connected to."""
        self._client = connect_when_ready(address) if address else None
        return {}

    def do_load_private(self, path: str, quick: bool, dtype: str) -> dict:
        """As ComfyUI does: parameters that nobody initialised, copied into from the mapped file."""
        self._dtype = getattr(torch, dtype)
        began = time.perf_counter()
        self._module = unet.build(quick).to(self._dtype).to_empty(device="cpu")
        built = time.perf_counter()
        self._module.load_state_dict(load_file(path))
        return {"build_s": built - began, "load_s": time.perf_counter() - built}

    def do_load_attached(self, path: str, quick: bool, dtype: str) -> dict:
        self._dtype = getattr(torch, dtype)
        began = time.perf_counter()
        module = unet.build(quick).to(self._dtype)
        built = time.perf_counter()
        weights = self._client.attach(path, dtype=self._dtype, progress=False)
        attached = time.perf_counter()
        load_attached(module, weights)
        self._module = module
        assigned = time.perf_counter()
        return {
            "build_s": built - began,
            "attach_s": attached - built,
            "load_attached_s": assigned - attached,
            "load_s": assigned - built,
            "weight_bytes": weights.size_bytes,
        }

    def do_forward(self) -> dict:
        times = []
        for _ in range(1 + WARM_FORWARDS):
            began = time.perf_counter()
            result = unet.forward(self._module, self._dtype)
            times.append(time.perf_counter() - began)
        digest = hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert result.isfinite().all()
        return {"first_forward_s": times[0], "forward_s": min(times[1:]), "output": digest}


def main() -> None:
    # As many workers as cores there may be: each takes one.
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, f"do_{command.pop('do')}")(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
