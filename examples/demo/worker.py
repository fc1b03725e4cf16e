"""One worker: a process of its own that carries out commands, one line of JSON each way.

Ends when its standard input does, so that it cannot outlive the demo.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "txt2img"))

from painter import Order, Painter  # noqa: E402

Reply = dict[str, Any]


class Worker:
    """What the commands share: the connection, and whatever must stay in memory to be measured."""

    def __init__(self) -> None:
        self._client: luna_broker.Client | None = None
        self._kept: list[object] = []

    def connect(self, address: str, name: str) -> Reply:
        self._client = luna_broker.connect(address, name=name)
        rungs = self._client.session.rungs
        rung = next((rung for rung in rungs if str(rung.device) == "cpu"), rungs[0])
        return {"rung": str(rung.rung), "reason": str(rung.reason)}

    def round_trips(self, vae: str, image: str, output: str, repetitions: int) -> Reply:
        """Encodes and decodes one picture again and again; every time must give the same."""
        client = self._connected()
        model = client.vae(vae)
        pixels = torch.from_numpy(np.load(image))[None]
        # Born in shared memory: the broker reads the picture where it is put here.
        shared = client.empty(tuple(pixels.shape), torch.float32)
        shared.copy_(pixels)
        calls: dict[str, list[Reply]] = {"encode": [], "decode": []}
        first: torch.Tensor | None = None
        for repetition in range(1, repetitions + 1):
            latent, encode = _timed(model, model.encode, shared)
            decoded, decode = _timed(model, model.decode, latent)
            if first is None:
                first = decoded.clone()
            elif not torch.equal(first, decoded):
                raise AssertionError(f"repetition {repetition} decoded to another picture")
            calls["encode"].append(encode)
            calls["decode"].append(decode)
        assert first is not None
        np.save(output, first[0].numpy())
        return {"calls": calls}

    def load_alone(self, path: str) -> Reply:
        """Loads a model as a worker without a broker does."""
        # A copy per tensor, as copying into a module's parameters makes one: what load_file
        # returns is the mapped file, whose pages all processes share until then.
        self._kept.append({key: value.clone() for key, value in load_file(path).items()})
        return {}

    def load_shared(self, path: str) -> Reply:
        """Uses the broker's copy, decoder and encoder, so that all of its weights are touched."""
        model = self._connected().vae(path)
        latent = torch.zeros(1, int(model.info["latent_channels"]), 8, 8)
        model.encode(model.decode(latent))
        self._kept.append(model)
        return {}

    def paint(self, checkpoint: str, order: Reply, output: str) -> Reply:
        """Paints one picture as the example `txt2img` does."""
        loras = tuple((file, strength) for file, strength in order.pop("loras"))
        painter = Painter(self._connected(), checkpoint)
        picture = painter.paint(Order(loras=loras, **order))
        np.save(output, picture.pixels.numpy())
        return {"sampling_s": picture.sampling_s, "steps": order["steps"], "hits": picture.hits}

    def _connected(self) -> luna_broker.Client:
        if self._client is None:
            raise RuntimeError("the worker was given work before an address")
        return self._client


def _timed(
    model: luna_broker.Vae, call: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
) -> tuple[torch.Tensor, Reply]:
    started = time.perf_counter()
    result = call(tensor)
    took_s = time.perf_counter() - started
    last = model.last
    return result, {
        "took_s": took_s,
        "queued_s": last.queued_s,
        "run_s": last.run_s,
        "copied_in": last.bytes_copied_in,
        "copied_out": last.bytes_copied_out,
    }


def main() -> None:
    # The broker does the computing; a thread pool per worker would only get in its way.
    torch.set_num_threads(1)
    worker = Worker()
    commands: dict[str, Callable[..., Reply]] = {
        "connect": worker.connect,
        "round_trips": worker.round_trips,
        "paint": worker.paint,
        "load_alone": worker.load_alone,
        "load_shared": worker.load_shared,
    }
    replies, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ok": True}), file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = {"ok": True, **commands[command.pop("do")](**command)}
        except (luna_broker.LunaBrokerError, AssertionError, RuntimeError, OSError) as error:
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
