"""What a loader gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luna_broker.comfyui.choice import Choice


@dataclass(frozen=True)
class Loaded:
    """Models, and how they are had; `None` for what the kind of file does not have."""

    choice: Choice
    model: Any = None
    clip: Any = None
    vae: Any = None

    @property
    def line(self) -> str:
        """Which mode it is, and why."""
        return str(self.choice)
