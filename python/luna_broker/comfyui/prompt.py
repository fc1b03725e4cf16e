"""LoRAs that a prompt names: `a house <lora:ink wash:0.8:0.6>`. Text in, text and LoRAs out; knows no ComfyUI.

    <lora:NAME>             at full strength
    <lora:NAME:0.8>         at 0.8 on the diffusion model and on the text encoders
    <lora:NAME:0.8:0.6>     at 0.8 on the diffusion model, at 0.6 on the text encoders

NAME is a file of the folder of LoRAs: with or without its ending, with or without its subfolder (`/` or `\\`), spaces
and all. `\\:`, `\\<`, `\\>` and `\\\\` stand for the sign itself. `\\<lora:…>` is text, and loses its backslash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Endings that a name may be written without; of others, "ink.v2" say, nothing is cut off.
ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")

# How many files an ambiguity names.
NAMED_FILES = 4

_TAG = re.compile(r"(\\?)<lora:((?:\\.|[^\\<>\n])*)>", re.IGNORECASE)
_PIECE = re.compile(r"\\.|[^\\]|\\")
_ESCAPED = re.compile(r"\\([:<>\\])")


class Lora(NamedTuple):
    """A LoRA and how strongly it is applied; as a tuple, an entry of a LoRA stack."""

    name: str
    model_strength: float
    clip_strength: float


@dataclass(frozen=True)
class Prompt:
    """What a prompt says."""

    text: str
    """The prompt without its LoRAs: what is encoded."""
    loras: tuple[Lora, ...]
    """In the order in which they are named."""
    warnings: tuple[str, ...]
    """What was written like a LoRA and is none; it is not part of the text either."""


def parse(written: str) -> Prompt:
    """Takes the LoRAs out of a prompt, with the commas and spaces that were there for them alone."""
    kept = ""
    loras: list[Lora] = []
    warnings: list[str] = []
    rest = written
    while match := _TAG.search(rest):
        before, after = rest[: match.start()], rest[match.end() :]
        if match[1]:
            kept, rest = kept + before + match[0][1:], after
            continue
        try:
            loras.append(_lora(match[2]))
        except ValueError as error:
            warnings.append(f"{match[0]} was skipped: {error}")
        kept, rest = _joined(kept + before, after)
    return Prompt(kept + rest, tuple(loras), tuple(warnings))


def find(name: str, files: Sequence[str]) -> str:
    """The file that a LoRA's name means, out of a folder's, as it is written there.

    A path counts before a file's name without its folder, and a name as it is written before other cases. Raises
    `LookupError`, saying what is wrong, where there is none or more than one.
    """
    wanted = _plain(name)
    for part in (str, _without_folder):
        for spelling in (str, str.casefold):
            names = {file: {spelling(reading) for reading in _readings(part(_plain(file)))} for file in files}
            found = [file for file in files if spelling(wanted) in names[file]]
            if len(found) == 1:
                return found[0]
            if found:
                several = ", ".join(found[:NAMED_FILES]) + (", …" if len(found) > NAMED_FILES else "")
                raise LookupError(f"{name!r} may be any of {several}; write more of its path")
    raise LookupError(f"there is no LoRA {name!r}")


def _lora(inside: str) -> Lora:
    """What is between `<lora:` and `>`. Raises `ValueError` for what is no LoRA."""
    name, *strengths = (_ESCAPED.sub(r"\1", field).strip() for field in _fields(inside))
    if not name:
        raise ValueError("it has no name")
    if len(strengths) > 2:
        raise ValueError(f"behind the name there is room for two strengths, not for {len(strengths)}")
    model = _strength(strengths[0]) if strengths else 1.0
    return Lora(name, model, _strength(strengths[1]) if len(strengths) > 1 else model)


def _fields(inside: str) -> list[str]:
    fields = [""]
    for piece in _PIECE.findall(inside):
        if piece == ":":
            fields.append("")
        else:
            fields[-1] += piece
    return fields


def _strength(written: str) -> float:
    try:
        strength = float(written)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"{written!r} is no strength; write a number such as 0.8")
    return strength


def _joined(before: str, after: str) -> tuple[str, str]:
    """Both sides of a LoRA that was taken out. Of two commas, or one beside nothing, one goes; lines stay lines."""
    left, right = before.rstrip(" \t"), after.lstrip(" \t")
    was_spaced = (left, right) != (before, after)
    if right.startswith(",") and (not left or left[-1] in ",\n"):
        bare = right[1:]
        right = bare.lstrip(" \t")
        was_spaced |= right != bare
    if left.endswith(",") and (not right or right.startswith("\n")):
        left = left[:-1].rstrip(" \t")
    meet = left and right and left[-1] != "\n" and right[0] not in ",\n"
    return left + (" " if was_spaced and meet else ""), right


def _plain(name: str) -> str:
    """A path in the one way of writing it in which paths are compared."""
    return name.replace("\\", "/").strip().strip("/")


def _without_folder(path: str) -> str:
    return path.rpartition("/")[2]


def _readings(path: str) -> Iterable[str]:
    yield path
    stem, dot, ending = path.rpartition(".")
    if dot + ending.lower() in ENDINGS:
        yield stem
