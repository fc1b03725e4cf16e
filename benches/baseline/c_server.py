"""What every plain-Python client of the C server `hand_off` does first."""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

from harness.sizes import Size

OPENING = struct.Struct("=IIQ")


class Mode(IntEnum):
    IN_PLACE = 0
    ONE_COPY = 1
    RAW = 2


def connect(path: str, mode: Mode, size: Size) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(path)
    link.sendall(OPENING.pack(mode, size.latent_bytes, size.image_bytes))
    return link
