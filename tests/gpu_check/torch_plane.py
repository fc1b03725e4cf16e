"""Torch tensors of a GPU through the real broker: are they right, on every stream, and what is left when it dies.

Prints a line for each part as soon as it knows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import luna_broker
import torch
from hand_offs import LATENT, MODEL, arguments, latent, marks, said, synchronize, wanted
from programs import Broker, Deadline, run, tell, with_libtorch

# GPU clock ticks: about a millisecond.
SLEEP = 2_000_000


class Plane:
    def __init__(self, broker: Broker, place: str, rounds: int) -> None:
        self.broker, self.place, self.rounds = broker, place, rounds
        self.client = luna_broker.connect(broker.socket, timeout=30)
        self.vae = self.client.vae(MODEL)

    def first(self) -> dict:
        given = latent(self.place)
        image = self.vae.decode(given)
        synchronize(self.place)
        return {
            "is_on": str(image.device),
            "is_right": torch.equal(marks(image), wanted(given)),
            "bytes_copied_in": self.vae.last.bytes_copied_in,
            "bytes_copied_out": self.vae.last.bytes_copied_out,
            "rungs": [[rung.device, rung.rung, rung.reason] for rung in self.client.session.rungs],
            "allocator": torch.cuda.get_allocator_backend() if self.place == "cuda" else "cpu",
        }

    def doctor(self) -> dict:
        """What the program itself says of this machine, beside a broker."""
        command = [self.broker.program, "doctor", "--socket", self.broker.socket]
        end = run(command, Deadline(30), with_libtorch())
        return {"said": end.tail(3000).splitlines()}

    def fresh_data(self) -> dict:
        return self._count(lambda _: latent(self.place))

    def streams_that_lag(self) -> dict:
        """Each round on another stream than the last, its latent made after a pause of the GPU."""
        streams = [torch.cuda.Stream() for _ in range(3)]

        def late(at: int) -> torch.Tensor:
            torch.cuda.set_stream(streams[at % len(streams)])
            torch.cuda._sleep(SLEEP)
            return latent(self.place)

        try:
            return self._count(late)
        finally:
            torch.cuda.set_stream(torch.cuda.default_stream())

    def built_in_place(self) -> dict:
        slot = self.client.empty(LATENT, torch.float32, device=self.place)
        copied = set()

        def fill(_: int) -> torch.Tensor:
            slot.copy_(latent(self.place))
            return slot

        counted = self._count(fill, lambda: copied.add(self.vae.last.bytes_copied_in))
        return counted | {"bytes_copied_in": sorted(copied)}

    def host_tensors(self) -> dict:
        return self._count(lambda _: latent("cpu"))

    def side_stream_readers(self) -> dict:
        """An image read late on a stream that nobody told the broker of, and dropped at once, as offloading does."""
        side, wrong, rounds = torch.cuda.Stream(), 0, max(1, self.rounds // 10)
        for _ in range(rounds):
            given = latent(self.place)
            image = self.vae.decode(given)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(5 * SLEEP)
                read = marks(image).clone()
            del image
            for _ in range(4):
                self.vae.decode(latent(self.place))
            synchronize(self.place)
            wrong += not torch.equal(read, wanted(given))
        return {"rounds": rounds, "wrong": wrong}

    def broker_killed(self) -> dict:
        given = latent(self.place)
        image = self.vae.decode(given)
        synchronize(self.place)
        self.broker.kill()
        found: dict = {"image_after_the_kill": self._look(image, given)}
        began = time.perf_counter()
        try:
            self.vae.decode(given)
            found["next_call"] = "succeeded, which it could not"
        except luna_broker.LunaBrokerError as error:
            found["next_call"] = said(error)
        found["seconds_until_it_says_so"] = round(time.perf_counter() - began, 4)
        found["image_a_little_later"] = self._look(image, given)
        self.broker.again()
        began = time.perf_counter()
        again = self.vae.decode(given)
        synchronize(self.place)
        found["call_to_a_new_broker"] = {
            "is_right": torch.equal(marks(again), wanted(given)),
            "seconds": round(time.perf_counter() - began, 4),
        }
        del image
        return found

    def _look(self, image: torch.Tensor, given: torch.Tensor) -> str:
        time.sleep(0.3)
        try:
            seen = marks(image).clone()
            synchronize(self.place)
        except RuntimeError as error:
            return said(error).splitlines()[0]
        return "as it was" if torch.equal(seen, wanted(given)) else "other bytes than before"

    def _count(self, make: Callable[[int], torch.Tensor], after: Callable[[], object] = lambda: None) -> dict:
        """Two images are kept at a time, so that slots are taken and given back under work in flight."""
        wrong, kept = 0, []
        for at in range(self.rounds):
            given = make(at)
            expected = wanted(given).clone()
            kept.append((self.vae.decode(given), expected))
            after()
            if len(kept) > 2:
                image, expected = kept.pop(0)
                wrong += not torch.equal(marks(image), expected)
        wrong += sum(not torch.equal(marks(image), expected) for image, expected in kept)
        return {"rounds": self.rounds, "wrong": int(wrong)}


PARTS = ["first", "doctor", "fresh_data", "streams_that_lag", "built_in_place", "host_tensors", "side_stream_readers"]
ON_A_GPU = ["streams_that_lag", "side_stream_readers"]
# Last: what a broken GPU context leaves is of no use to the others.
LAST = ["broker_killed"]


def main() -> int:
    chosen = arguments(__doc__).parse_args()
    parts = [part for part in PARTS + LAST if chosen.place == "cuda" or part not in ON_A_GPU]
    with (
        tempfile.TemporaryDirectory() as folder,
        Broker(chosen.broker, Path(folder), "--device", chosen.place) as broker,
    ):
        return int(not play(Plane(broker, chosen.place, chosen.rounds), parts))


def play(plane: Plane, parts: list[str]) -> bool:
    good = True
    for part in parts:
        try:
            found = getattr(plane, part)()
        except Exception as error:
            tell(part=part, error=said(error))
            good = False
            if part == PARTS[0]:
                break  # the others would say the same
        else:
            tell(part=part, **found)
            good &= not found.get("wrong") and found.get("is_right", True)
    return good


if __name__ == "__main__":
    sys.exit(main())
