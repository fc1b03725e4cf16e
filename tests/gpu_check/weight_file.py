"""Safetensors files of float16, without the library: the machine with the GPU may not have it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch

Shape = tuple[int, ...]


def head(shapes: dict[str, Shape]) -> tuple[bytes, int]:
    """What comes before the tensors, and how many bytes they take."""
    entries, at = {}, 0
    for key, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    words = json.dumps(entries).encode()
    words += b" " * (-len(words) % 8)
    return struct.pack("<Q", len(words)) + words, at


def write(path: Path, shapes: dict[str, Shape], make: Callable[[str, Shape], torch.Tensor]) -> None:
    """One tensor after the other: they need not fit into memory together. A file is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(head(shapes)[0])
        for key, shape in shapes.items():
            # Of a GPU's tensors only bytes cross.
            tensor = make(key, shape).to(torch.float16).cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    new.replace(path)


def read(path: str | Path, place: str) -> dict[str, torch.Tensor]:
    """What a worker loads for itself."""
    mapped = torch.from_file(str(path), size=Path(path).stat().st_size, dtype=torch.uint8)
    (length,) = struct.unpack("<Q", mapped[:8].numpy().tobytes())
    header = json.loads(mapped[8 : 8 + length].numpy().tobytes())
    data = mapped[8 + length :]

    def one(entry: dict) -> torch.Tensor:
        start, end = entry["data_offsets"]
        return data[start:end].view(torch.float16).view(entry["shape"]).to(place, copy=True)

    return {key: one(entry) for key, entry in header.items()}
