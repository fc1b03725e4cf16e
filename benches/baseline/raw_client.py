"""Tensor bytes over a Unix socket as fast as a plain client gets them: no framing, large queues, memory reused."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import numpy
from harness.commands import Peer, answer_commands
from harness.sizes import Size

from .c_server import Mode, connect

SOCKET_BYTES = 4 << 20


class RawClient(Peer):
    def __init__(self, path: str) -> None:
        self._path = path

    def keeps_images(self, variant: str) -> bool:
        return False

    def exchange(self, variant: str, size: Size) -> Callable[[numpy.ndarray], numpy.ndarray]:
        link = connect(self._path, Mode.RAW, size)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
        image = numpy.zeros(size.image_shape, numpy.float32)
        into = memoryview(image).cast("B")
        length = image.nbytes

        def call(latent: numpy.ndarray) -> numpy.ndarray:
            link.sendall(memoryview(latent).cast("B"))
            done = 0
            while done < length:
                part = link.recv_into(into[done:], length - done, socket.MSG_WAITALL)
                if part == 0:
                    raise ConnectionError("the server closed the connection within an image")
                done += part
            return image

        return call


if __name__ == "__main__":
    answer_commands(RawClient(sys.argv[1]))
