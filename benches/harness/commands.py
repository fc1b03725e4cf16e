"""The inside of a peer process: commands come as JSON lines, each gets one JSON line back."""

from __future__ import annotations

import json
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy

from . import proof, timing
from .sizes import Size


class Peer(ABC):
    """One client process with whatever it talks to. `variant` tells apart several ways of asking the same server."""

    # The server laid a known pattern between the marks, so that every element can be compared.
    patterned = True

    def open(self) -> dict:
        """Connects; the facts it returns end up in the report."""
        return {}

    @abstractmethod
    def exchange(self, variant: str, size: Size) -> Callable[[Any], Any]:
        """A function from latent to image; set-up for this size is done before it returns."""

    def keeps_images(self, variant: str) -> bool:
        """Whether an image stays valid while the next request is made."""
        return True

    def wrap(self, latent: numpy.ndarray) -> Any:
        """The latent as this peer's callers hold it."""
        return latent

    def ping(self) -> Any:
        raise NotImplementedError


def answer_commands(peer: Peer) -> None:
    """Runs until standard input ends."""
    # Libraries print; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    conversation = _Conversation(peer)
    for line in sys.stdin:
        try:
            answer = conversation.obey(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Conversation:
    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._open: dict[tuple[str, Size], tuple[Callable[[Any], Any], proof.Latents]] = {}

    def obey(self, command: dict) -> dict:
        do = command.pop("do")
        if "size" in command:
            command["size"] = Size(**command["size"])
        return getattr(self, f"do_{do}")(**command)

    def do_open(self) -> dict:
        return self._peer.open() | {"pid": os.getpid()}

    def do_verify(self, variant: str, size: Size) -> dict:
        call, latents = self._exchange(variant, size)
        proven = proof.verify(call, size, latents, self._peer.patterned)
        if self._peer.keeps_images(variant):
            proof.verify_two_live(call, latents)
        return proven

    def do_hand_off(self, variant: str, size: Size, **limits: Any) -> dict:
        return timing.hand_off(*self._exchange(variant, size), **limits)

    def do_control(self, **limits: Any) -> dict:
        return timing.control(self._peer.ping, **limits)

    def do_repeat(self, variant: str, size: Size, count: int) -> dict:
        """Requests and nothing else, for counting what a request costs the operating system."""
        call, latents = self._exchange(variant, size)
        ready = [latents.new() for _ in range(4)]
        image = None
        for i in range(count):
            image = call(ready[i & 3])
        asked_last = numpy.asarray(ready[(count - 1) & 3]).reshape(-1)
        latents.check(image, asked_last[: proof.MARKS].astype(numpy.float32))
        return {"count": count}

    def _exchange(self, variant: str, size: Size) -> tuple[Callable[[Any], Any], proof.Latents]:
        if (variant, size) not in self._open:
            self._open[variant, size] = (
                self._peer.exchange(variant, size),
                proof.Latents(size, self._peer.wrap),
            )
        return self._open[variant, size]
