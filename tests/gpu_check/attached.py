"""Weights that workers attach: what a set costs 1, 2, 4 and 8 of them, and what it does to their forward.

Prints a line for each part as soon as it knows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import weight_file
from hand_offs import arguments, said, synchronize
from programs import Broker, python, tell

COUNTS = (1, 2, 4, 8)
WIDTH = 4096
# As many parameters as the UNet of SDXL has: 2.57 billion in float16 are 5.1 GB.
LAYERS = {"cuda": 153, "cpu": 2}
ROUNDS = 30


def write(path: Path, layers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # Varied by layer without the time that new random numbers take.
    base = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    shapes = {f"layers.{at}.weight": (WIDTH, WIDTH) for at in range(layers)}
    weight_file.write(path, shapes, lambda key, _: base.roll(int(key.split(".")[1]), 0))


def forward(weights: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
    for at in range(len(weights)):
        given = torch.nn.functional.linear(given, weights[f"layers.{at}.weight"]).tanh()
    return given


def given(place: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64 if place == "cuda" else 2, WIDTH, generator=generator).half().to(place)


def attach(socket: str, path: str, place: str):
    import luna_broker

    client = luna_broker.connect(socket, timeout=300)
    return client, client.attach(path, device=place, progress=False)


def work(kind: str, chosen) -> None:
    """A worker: says what it found when it has the weights, and stays until its input ends."""
    torch.zeros(1, device=chosen.place)
    began = time.perf_counter()
    try:
        if kind == "attached":
            _client, weights = attach(chosen.socket, chosen.model, chosen.place)
        else:
            weights = weight_file.read(chosen.model, chosen.place)
        synchronize(chosen.place)
        seconds = time.perf_counter() - began
        out = forward(weights, given(chosen.place)).float().cpu()
        print(json.dumps({"seconds": round(seconds, 4), "digest": out.double().sum().item()}), flush=True)
    except Exception as error:
        print(json.dumps({"error": said(error)}), flush=True)
    sys.stdin.read()


def start(kind: str, chosen, socket: str, model: str) -> subprocess.Popen:
    command = [python(), __file__, "--broker", chosen.broker, "--place", chosen.place]
    command += ["--worker", kind, "--socket", socket, "--model", model]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def used(place: str) -> int:
    """Bytes of the device that are taken; a worker's share of host memory is measured elsewhere."""
    if place == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def grow(kind: str, counts: tuple[int, ...], chosen, socket: str, model: str) -> set[float]:
    """More and more workers, all alive at once; what their forwards gave."""
    workers: list[subprocess.Popen] = []
    digests: set[float] = set()
    before = used(chosen.place)
    try:
        for count in counts:
            new = [start(kind, chosen, socket, model) for _ in range(count - len(workers))]
            workers += new
            found = [json.loads(worker.stdout.readline()) for worker in new]
            errors = [one["error"] for one in found if "error" in one]
            if errors:
                raise RuntimeError(errors[0])
            digests |= {one["digest"] for one in found}
            tell(part=kind, workers=count, bytes=used(chosen.place) - before, seconds=[one["seconds"] for one in found])
        return digests
    finally:
        for worker in workers:
            worker.stdin.close()
        for worker in workers:
            worker.wait()


def timed(weights: dict[str, torch.Tensor], place: str) -> list[float]:
    taken = []
    for _ in range(ROUNDS if place == "cuda" else 3):
        synchronize(place)
        began = time.perf_counter()
        forward(weights, given(place))
        synchronize(place)
        taken.append(time.perf_counter() - began)
    return taken


def speed(chosen, socket: str, model: str) -> dict:
    """The same forward on the broker's memory and on this process's own, turn by turn."""
    _client, shared = attach(socket, model, chosen.place)
    own = {key: tensor.clone() for key, tensor in shared.items()}
    rounds: dict[str, list[float]] = {"attached": [], "private": []}
    for _ in range(5):
        rounds["attached"].append(statistics.median(timed(shared, chosen.place)))
        rounds["private"].append(statistics.median(timed(own, chosen.place)))
    same = torch.equal(forward(shared, given(chosen.place)), forward(own, given(chosen.place)))
    attached, private = (statistics.median(rounds[kind]) for kind in ("attached", "private"))
    return {"attached_s": attached, "private_s": private, "ratio": round(attached / private, 4), "is_right": same}


class Layers(torch.nn.Module):
    """The same forward, as a module."""

    def __init__(self, count: int) -> None:
        super().__init__()
        made = (torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float16) for _ in range(count))
        self.layers = torch.nn.ModuleList(made)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            given = layer(given).tanh()
        return given


def in_module(chosen, socket: str, model: str) -> dict:
    """A module built without memory: what the weights cost it, and whether it goes on after they were taken away."""
    import luna_broker
    from luna_broker.torch import load_attached, skeleton

    with luna_broker.connect(socket, timeout=300) as client:
        views = client.attach(model, device=chosen.place, progress=False)
        with skeleton():
            module = Layers(len(views)).eval()
        wanted, before = forward(views, given(chosen.place)), used(chosen.place)
        weights = load_attached(module, model, client=client, device=chosen.place)
        took = used(chosen.place) - before
        shared = all(parameter.data_ptr() == views[key].data_ptr() for key, parameter in module.named_parameters())
        same = [torch.equal(module(given(chosen.place)), wanted)]
        # A session is good again once it has attached anew all that was taken from it.
        del views
        client.unload(model, force=True)
        try:
            refused = f"nothing: it computed {tuple(module(given(chosen.place)).shape)}"
        except luna_broker.Stale as error:
            refused = said(error)
        try:
            weights.reattach()
            outcome = "reattached"
        except luna_broker.Unsupported as error:
            # Plain memory, where the driver hands out no other.
            outcome = said(error)
        else:
            same.append(torch.equal(module(given(chosen.place)), wanted))
        is_right = all(same) and shared and refused.startswith("Stale")
        return {"took_bytes": took, "is_shared": shared, "refused": refused, "outcome": outcome, "is_right": is_right}


def write_access(chosen, socket: str, model: str) -> dict:
    """What comes of a write, in a process that may die of it."""
    code = (
        "import sys, torch, luna_broker\n"
        f"weights = luna_broker.connect({socket!r}).attach({model!r}, device={chosen.place!r}, progress=False)\n"
        "first = weights['layers.0.weight']\n"
        "first.zero_()\n"
        "if first.is_cuda: torch.cuda.synchronize()\n"
        "print('written', float(first.float().abs().sum()))\n"
    )
    end = subprocess.run([python(), "-c", code], capture_output=True, text=True, timeout=60)
    last = (end.stdout + end.stderr).strip().splitlines()
    client, weights = attach(socket, model, chosen.place)
    return {
        "outcome": last[-1] if last else f"exit {end.returncode}",
        "others_see_it": bool(weights["layers.0.weight"].float().abs().sum() == 0),
        "verify": [report["found"] == report["expected"] for report in client.verify(model)],
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--worker", choices=["attached", "private"])
    parser.add_argument("--socket", default="")
    parser.add_argument("--model", default="")
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen)
        return 0
    counts = COUNTS if chosen.place == "cuda" else COUNTS[:2]
    with (
        tempfile.TemporaryDirectory() as folder,
        Broker(chosen.broker, Path(folder), "--device", chosen.place) as broker,
    ):
        model = Path(folder) / "weights.safetensors"
        write(model, LAYERS[chosen.place])
        # This process's own context counts neither before nor after.
        torch.zeros(1, device=chosen.place)
        tell(part="first", bytes=model.stat().st_size)
        found: dict[str, set[float]] = {}
        parts: list[tuple[str, Callable[[], dict]]] = [
            ("speed", lambda: speed(chosen, broker.socket, str(model))),
            ("module", lambda: in_module(chosen, broker.socket, str(model))),
            ("write", lambda: write_access(chosen, broker.socket, str(model))),
        ]
        good = True
        for kind in ("attached", "private"):
            try:
                found[kind] = grow(kind, counts[: 3 if kind == "private" else None], chosen, broker.socket, str(model))
            except Exception as error:
                tell(part=kind, error=said(error))
                good = False
        is_same = len(set().union(*found.values())) == 1
        tell(part="outputs", is_right=is_same)
        good &= is_same
        for part, play in parts:
            try:
                result = play()
            except Exception as error:
                tell(part=part, error=said(error))
                good = False
            else:
                tell(part=part, **result)
                good &= result.get("is_right", True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
