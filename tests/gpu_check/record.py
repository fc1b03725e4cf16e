"""What a run has found, written down after every step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import report


class Record:
    def __init__(self, folder: Path, name: str, facts: dict) -> None:
        self._json, self._page = folder / f"gpu-{name}.json", folder / f"gpu-{name}.md"
        self.content: dict = {"name": name, **facts, "steps": []}
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: dict) -> dict:
        self.content["steps"].append(step)
        self.flush()
        return step

    def flush(self) -> None:
        """Whole or not at all: the machine may be taken away at any moment."""
        _replace(self._json, json.dumps(self.content, indent=1) + "\n")
        # From what was written and nothing else, so that the page says what the figures say.
        _replace(self._page, report.page(json.loads(self._json.read_text())))

    @property
    def files(self) -> tuple[Path, Path]:
        return self._json, self._page


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
