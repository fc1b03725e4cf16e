"""What came of a workflow, as ComfyUI said it and as the tests' nodes kept it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Of the binary messages of ComfyUI's web socket: those that carry a preview, and a line for a node.
PREVIEW_MESSAGES = (1, 4)
TEXT_MESSAGE = 3

Message = dict[str, Any]


@dataclass
class Result:
    """What came of one workflow."""

    messages: list[Message] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # (id of the node, line) as nodes said it while they ran.
    lines: list[tuple[str, str]] = field(default_factory=list)
    # How many previews were shown.
    previews: int = 0
    folder: Path = Path()

    @property
    def error(self) -> dict[str, Any] | None:
        """What `execution_error` said, if it came to that."""
        return self._data("execution_error")

    @property
    def interrupted(self) -> bool:
        return self._data("execution_interrupted") is not None

    @property
    def ran(self) -> set[str]:
        """Ids of the nodes that were run; what others gave was kept from an earlier workflow."""
        return {str(message["data"]["node"]) for message in self.messages if message["type"] == "executing"}

    @property
    def text(self) -> str:
        """Everything that nodes told the user."""
        told = [line for _, line in self.lines]
        for output in self.outputs.values():
            told += [str(line) for line in output.get("text", [])]
        return "\n".join(told)

    def tensor(self, name: str) -> np.ndarray:
        """What a `Keep…` node of the tests was given under that name; float32."""
        return np.load(self._kept(name))

    def names(self) -> set[str]:
        return {kept["name"] for output in self.outputs.values() for kept in output.get("kept", [])}

    def ok(self) -> Result:
        """Itself; fails where the workflow did not run to its end."""
        if self.error is not None:
            trace = "".join(self.error["traceback"])
            raise AssertionError(f"{self.error['node_type']}: {self.error['exception_message']}\n{trace}")
        assert self._data("execution_success") is not None, f"the workflow did not run to its end: {self.messages}"
        return self

    def take_up(self, message: bytes) -> None:
        """Adds a binary message of ComfyUI's: these do not say of which workflow they are."""
        (kind,) = struct.unpack_from(">I", message)
        if kind in PREVIEW_MESSAGES:
            self.previews += 1
        elif kind == TEXT_MESSAGE:
            (length,) = struct.unpack_from(">I", message, 4)
            self.lines.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))

    def _data(self, kind: str) -> dict[str, Any] | None:
        return next((message["data"] for message in self.messages if message["type"] == kind), None)

    def _kept(self, name: str) -> Path:
        for output in self.outputs.values():
            for kept in output.get("kept", []):
                if kept["name"] == name:
                    return self.folder / "kept" / kept["file"]
        raise AssertionError(f"no node kept {name!r}; kept were {sorted(self.names())}")
