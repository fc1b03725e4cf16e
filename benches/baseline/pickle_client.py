"""The predecessor: torch tensors pickled over TCP, a Python server with a private result."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy
import torch
from harness.commands import Peer, answer_commands
from harness.proof import mark, pattern
from harness.sizes import Size

LENGTH = struct.Struct("!Q")


def send(link: socket.socket, tensor: torch.Tensor) -> None:
    data = pickle.dumps(tensor, protocol=pickle.HIGHEST_PROTOCOL)
    link.sendall(LENGTH.pack(len(data)))
    link.sendall(data)


def receive(link: socket.socket) -> torch.Tensor:
    (length,) = LENGTH.unpack(receive_exactly(link, LENGTH.size))
    return pickle.loads(receive_exactly(link, length))


def receive_exactly(link: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        part = link.recv_into(rest)
        if part == 0:
            raise EOFError
        rest = rest[part:]
    return data


def serve(port_to: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port_to.send(listener.getsockname()[1])
        while True:
            link, _ = listener.accept()
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(link,), daemon=True).start()


def answer(link: socket.socket) -> None:
    shape = receive(link).tolist()
    image = pattern(math.prod(shape))
    result = torch.from_numpy(image).reshape(shape)
    try:
        while True:
            mark(image, receive(link).numpy().reshape(-1))
            send(link, result)
    except EOFError:
        link.close()


class PickleClient(Peer):
    def __init__(self) -> None:
        self._port = 0

    def wrap(self, latent: numpy.ndarray) -> torch.Tensor:
        return torch.from_numpy(latent)

    def open(self) -> dict:
        spawn = multiprocessing.get_context("spawn")
        port_from, port_to = spawn.Pipe(duplex=False)
        spawn.Process(target=serve, args=(port_to,), daemon=True).start()
        self._port = port_from.recv()
        return {}

    def exchange(self, variant: str, size: Size) -> Callable[[torch.Tensor], torch.Tensor]:
        link = socket.create_connection(("127.0.0.1", self._port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(link, torch.tensor(size.image_shape))

        def call(latent: torch.Tensor) -> torch.Tensor:
            send(link, latent)
            return receive(link)

        return call


if __name__ == "__main__":
    answer_commands(PickleClient())
