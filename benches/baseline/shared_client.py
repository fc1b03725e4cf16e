"""The reference: a plain-Python client of the C server, with shared memory mapped once and reused."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable

import numpy
from harness.commands import Peer, answer_commands
from harness.sizes import Size

from .c_server import Mode, connect

REQUEST = struct.Struct("=QQ")
REPLY = struct.Struct("=QQ")
MODES = {"in place": Mode.IN_PLACE, "one copy": Mode.ONE_COPY}


def whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedClient(Peer):
    def __init__(self, path: str) -> None:
        self._path = path

    def exchange(self, variant: str, size: Size) -> Callable[[numpy.ndarray], numpy.ndarray]:
        link = connect(self._path, MODES[variant], size)
        _, received, _, _ = socket.recv_fds(link, 1, 1)
        stride = whole_pages(size.image_bytes)
        length = 2 * stride + whole_pages(size.latent_bytes)
        memory = mmap.mmap(received[0], length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        os.close(received[0])
        slot = numpy.frombuffer(memory, numpy.float16, size.latent_bytes // 2, 2 * stride).reshape(size.latent_shape)
        elements, shape = size.image_bytes // 4, size.image_shape
        sequence = 0

        def call(latent: numpy.ndarray) -> numpy.ndarray:
            nonlocal sequence
            sequence += 1
            slot[...] = latent
            link.sendall(REQUEST.pack(sequence, latent.nbytes))
            answered, offset = REPLY.unpack(link.recv(REPLY.size))
            assert answered == sequence
            return numpy.frombuffer(memory, numpy.float32, elements, offset).reshape(shape)

        return call


if __name__ == "__main__":
    answer_commands(SharedClient(sys.argv[1]))
