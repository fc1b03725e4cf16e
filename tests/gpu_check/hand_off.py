"""Latency of a latent out and an image back between two processes, by every way there is, in turn."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import luna_broker
import torch
from hand_offs import IMAGE, LATENT, MODEL, arguments, latent, marks, said, synchronize, wanted
from programs import Broker, tell
from torch import multiprocessing

WARM_UP = 10
OURS = "luna-broker"
COPIES = "image to pinned host memory and back, alone"
BASELINE = "torch.multiprocessing"

# Takes a latent, gives back the image on the same device.
Way = Callable[[torch.Tensor], torch.Tensor]


def serve(requests, replies, place: str) -> None:
    """What a Python daemon would do that shares tensors by torch's own CUDA IPC."""
    images = [torch.empty(IMAGE, device=place) for _ in range(4)]
    at = 0
    while (given := requests.get()) is not None:
        image = images[at % len(images)]
        marks(image).copy_(wanted(given))
        # Nothing of the caller's is kept when the answer goes out.
        del given
        replies.put(image)
        at += 1


class TorchServer:
    def __init__(self, place: str) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.requests, self.replies = spawning.SimpleQueue(), spawning.SimpleQueue()
        self.process = spawning.Process(target=serve, args=(self.requests, self.replies, place), daemon=True)
        self.process.start()

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        self.requests.put(given)
        return self.replies.get()

    def end(self) -> None:
        self.requests.put(None)
        self.process.join(10)


def ways(
    vaes: dict[str, luna_broker.Vae], client: luna_broker.Client, server: TorchServer, place: str
) -> dict[str, Way]:
    vae = vaes[OURS]
    host_image = torch.empty(IMAGE, pin_memory=place == "cuda")
    own = torch.empty(IMAGE, device=place)

    def through_the_host(given: torch.Tensor) -> torch.Tensor:
        return vae.decode(given.cpu()).to(place)

    def copies_alone(given: torch.Tensor) -> torch.Tensor:
        host_image.copy_(own)
        return host_image.to(place) if place == "cuda" else host_image.clone()

    def within_this_process(given: torch.Tensor) -> torch.Tensor:
        marks(own).copy_(wanted(given))
        return own

    def built_in_place(slot: torch.Tensor) -> Way:
        def way(given: torch.Tensor) -> torch.Tensor:
            slot.copy_(given)
            return vae.decode(slot)

        return way

    found: dict[str, Way] = {name: vae.decode for name, vae in vaes.items()}
    try:
        found[f"{OURS}, latent built in place"] = built_in_place(client.empty(LATENT, torch.float32, device=place))
    except Exception as error:
        tell(left_out="latent built in place", why=said(error))
    found[BASELINE] = server
    found[f"{OURS} by way of the host"] = through_the_host
    found[COPIES] = copies_alone
    found["within this process"] = within_this_process
    return found


def measure(ways: dict[str, Way], place: str, rounds: int) -> list[dict]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    wrong = dict.fromkeys(ways, 0)
    names = list(ways)
    for at in range(WARM_UP + rounds):
        # Another one goes first each time: none always follows the same.
        for name in names[at % len(names) :] + names[: at % len(names)]:
            given = latent(place)
            synchronize(place)
            began = time.perf_counter()
            image = ways[name](given)
            # The latency is that until the bytes can be used, not until a call returns.
            seen = marks(image).clone()
            synchronize(place)
            times[name].append(time.perf_counter() - began)
            wrong[name] += not torch.equal(seen, wanted(given))
            del image
    return [figures(name, times[name][WARM_UP:], times[BASELINE][WARM_UP:], int(wrong[name])) for name in ways]


def figures(name: str, times: list[float], baseline: list[float], wrong: int) -> dict:
    ratios = [own / other for own, other in zip(times, baseline, strict=True)]
    return {
        "way": name,
        "median_us": round(statistics.median(times) * 1e6, 2),
        "p90_us": round(statistics.quantiles(times, n=10)[-1] * 1e6, 2),
        "of_torch_multiprocessing": round(statistics.median(ratios), 3),
        # Copies alone carry no answer that could be wrong.
        "wrong": wrong if name != COPIES else "",
    }


def main() -> int:
    chosen = arguments(__doc__).parse_args()
    # What is paid where events do not order the two sides.
    orders = {OURS: [], f"{OURS}, order by the host": ["--gpu-order", "host"]}
    if chosen.place == "cpu":
        orders = {OURS: []}
    with contextlib.ExitStack() as ends:
        server = TorchServer(chosen.place)
        ends.callback(server.end)
        clients = {}
        for name, options in orders.items():
            folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
            broker = ends.enter_context(Broker(chosen.broker, folder, "--device", chosen.place, *options))
            clients[name] = ends.enter_context(luna_broker.connect(broker.socket, timeout=30))
        vaes = {name: client.vae(MODEL) for name, client in clients.items()}
        try:
            for vae in vaes.values():
                vae.decode(latent(chosen.place))
        except Exception as error:
            tell(part="first", error=said(error))
            return 1
        measured = measure(ways(vaes, clients[OURS], server, chosen.place), chosen.place, chosen.rounds)
        rungs = {name: [[rung.device, rung.rung] for rung in client.session.rungs] for name, client in clients.items()}
        tell(rounds=chosen.rounds, latent=LATENT, image=IMAGE, rungs=rungs)
        for figure in measured:
            tell(**figure)
    return int(any(figure.get("wrong") for figure in measured))


if __name__ == "__main__":
    sys.exit(main())
