"""How far something is that takes a while, for whoever watches a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

# What is done sooner than this needs no bar.
PATIENCE_S = 0.5


class Bar:
    """A bar on stderr, if that is a terminal and it takes a while: tqdm's where it is installed, else a line."""

    def __init__(self, name: str, unit: str = "B") -> None:
        self._title, self._unit = Path(name).name, unit
        self._is_watched = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        self._tqdm: Any = None
        self._is_drawn = False

    def __call__(self, done: int, total: int) -> None:
        if not self._is_watched or time.monotonic() - self._began < PATIENCE_S:
            return
        if not self._is_drawn:
            self._is_drawn = True
            self._tqdm = _tqdm(self._title, total, self._unit)
        if self._tqdm is None:
            percent = 100 * done // max(total, 1)
            whole = f"{total / 1e9:.2f} GB" if self._unit == "B" else f"{total}{self._unit}"
            sys.stderr.write(f"\r{self._title}: {percent:3d} % of {whole}")
            sys.stderr.flush()
        else:
            self._tqdm.update(done - self._tqdm.n)

    def close(self) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._is_drawn:
            sys.stderr.write("\n")


def _tqdm(title: str, total: int, unit: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(desc=title, total=total, unit=unit, unit_scale=unit == "B", file=sys.stderr)
