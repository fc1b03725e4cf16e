"""Python at both ends: `multiprocessing.shared_memory` written in place, a `Pipe` as the doorbell."""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy
from harness.commands import Peer, answer_commands
from harness.proof import mark, pattern
from harness.sizes import Size


def serve(requests: Connection, memory: SharedMemory, size: Size) -> None:
    images = [image.reshape(-1) for image in image_views(memory, size)]
    latent = latent_view(memory, size).reshape(-1)
    for image in images:
        image[:] = pattern(image.size)
    requests.send("ready")
    while (sequence := requests.recv()) is not None:
        mark(images[sequence & 1], latent)
        requests.send((sequence, sequence & 1))


def image_views(memory: SharedMemory, size: Size) -> list[numpy.ndarray]:
    return [numpy.ndarray(size.image_shape, numpy.float32, memory.buf, slot * size.image_bytes) for slot in range(2)]


def latent_view(memory: SharedMemory, size: Size) -> numpy.ndarray:
    return numpy.ndarray(size.latent_shape, numpy.float16, memory.buf, 2 * size.image_bytes)


class PipeClient(Peer):
    def __init__(self) -> None:
        # A forked server would inherit the pipes the commands come through.
        self._spawn = multiprocessing.get_context("spawn")
        # A dropped SharedMemory closes itself under its views.
        self._memories: list[SharedMemory] = []

    def exchange(self, variant: str, size: Size) -> Callable[[numpy.ndarray], numpy.ndarray]:
        memory = SharedMemory(create=True, size=2 * size.image_bytes + size.latent_bytes)
        atexit.register(memory.unlink)
        self._memories.append(memory)
        link, far_end = self._spawn.Pipe()
        server = self._spawn.Process(target=serve, args=(far_end, memory, size), daemon=True)
        server.start()
        far_end.close()
        link.recv()
        images, slot = image_views(memory, size), latent_view(memory, size)
        sequence = 0

        def call(latent: numpy.ndarray) -> numpy.ndarray:
            nonlocal sequence
            sequence += 1
            slot[...] = latent
            link.send(sequence)
            answered, image = link.recv()
            assert answered == sequence
            return images[image]

        return call


if __name__ == "__main__":
    answer_commands(PipeClient())
