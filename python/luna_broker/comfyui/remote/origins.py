"""Which file the tensors of an adapter come from: a broker that can read it too needs only its path.

Tensors are remembered weakly, from when ComfyUI reads a file. Nodes hand them on as they are, or make others of them,
which are of no file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# What a file's keys about text encoders begin with, and what those of adapters for them do.
OF_TEXT_ENCODERS = ("lora_te", "text_encoder", "lycoris_te", "base_model.model.text_model.")
ALPHA = ".alpha"

# Larger files are models; nobody applies those as adapters.
MOST_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class File:
    """A file as it was when it was read."""

    path: str
    state: tuple[int, int]
    """When it was changed, in nanoseconds, and its size in bytes."""
    keys: frozenset[str]
    alphas: Mapping[str, float]
    """By what the file calls the layer."""


# The file and the key of each tensor that somebody still has.
_KNOWN = WeakTensorKeyDictionary()


def install() -> None:
    """Has ComfyUI's reading of files remember what came from where. A second time does nothing."""
    import comfy.utils

    read = comfy.utils.load_torch_file
    if hasattr(read, "luna_broker_original"):
        return

    @functools.wraps(read)
    def load_torch_file(ckpt: Any, *arguments: Any, **options: Any) -> Any:
        found = read(ckpt, *arguments, **options)
        remember(ckpt, found[0] if isinstance(found, tuple) else found)
        return found

    load_torch_file.luna_broker_original = read  # type: ignore[attr-defined]
    comfy.utils.load_torch_file = load_torch_file


def remember(path: Any, tensors: Any) -> None:
    """Notes that these tensors are all that is in a file."""
    path = os.path.abspath(str(path))
    state = _state(path)
    if not path.lower().endswith(".safetensors") or state is None or state[1] > MOST_BYTES:
        return
    alphas = {
        key.removesuffix(ALPHA): float(tensor)
        for key, tensor in tensors.items()
        if key.endswith(ALPHA) and tensor.numel() == 1
    }
    file = File(path, state, frozenset(tensors), alphas)
    for key, tensor in tensors.items():
        _KNOWN[tensor] = (file, key)


def of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The file that all tensors of a change of a layer are of; `None` where there is not one."""
    found = {_path(tensor) for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    return found.pop() if len(found) == 1 else None


def file_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The file that means the same as these tensors, by keys of an adapter, to the model that they are for.

    `None` where they are not of one file, where it says more than they do, and where it was changed since.
    """
    known = {key: _KNOWN.get(tensor) for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    files = {None if found is None else found[0] for found in known.values()}
    file = files.pop() if len(files) == 1 else None
    if file is None or _state(file.path) != file.state:
        return None
    is_text = all(key.startswith("text_encoders.") for key in tensors)
    used = {found[1] for found in known.values() if found is not None}
    relevant = {key for key in file.keys if key.startswith(OF_TEXT_ENCODERS) == is_text and not key.endswith(ALPHA)}
    if used != relevant:
        return None
    for key, (_, name) in known.items():
        layer, alpha = _layer(key, tensors), _alpha(file, name)
        own = tensors.get(f"{layer}{ALPHA}") if layer is not None else None
        if (None if own is None else float(own)) != alpha and not key.endswith((".diff", ".diff_b", ".set_weight")):
            return None
    return file.path


def _path(tensor: torch.Tensor) -> str | None:
    found = _KNOWN.get(tensor)
    return None if found is None else found[0].path


def _state(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _layer(key: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The layer with an alpha that a key of an adapter is about."""
    return next((stem for stem in _stems(key) if f"{stem}{ALPHA}" in tensors), None)


def _alpha(file: File, key: str) -> float | None:
    """What a file's alpha is for one of its keys; of one written as a half, what that becomes as a float."""
    found = next((file.alphas[stem] for stem in _stems(key) if stem in file.alphas), None)
    return None if found is None else float(torch.tensor(found, dtype=torch.float32))


def _stems(key: str) -> list[str]:
    """What a key may be about: without its last part, and without its last two."""
    return [key.rsplit(".", 1)[0], key.rsplit(".", 2)[0]]
