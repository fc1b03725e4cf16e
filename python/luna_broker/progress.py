"""How far the broker is with loading, for whoever watches a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

# What is loaded sooner than this needs no bar.
PATIENCE_S = 0.5


class Bar:
    """A bar on stderr, if that is a terminal and loading takes a while: tqdm's where it is installed, else a line."""

    def __init__(self, name: str) -> None:
        self._title = Path(name).name
        self._is_watched = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        self._tqdm: Any = None
        self._is_drawn = False

    def __call__(self, done: int, total: int) -> None:
        if not self._is_watched or time.monotonic() - self._began < PATIENCE_S:
            return
        if not self._is_drawn:
            self._is_drawn = True
            self._tqdm = _tqdm(self._title, total)
        if self._tqdm is None:
            percent = 100 * done // max(total, 1)
            sys.stderr.write(f"\r{self._title}: {percent:3d} % of {total / 1e9:.2f} GB")
            sys.stderr.flush()
        else:
            self._tqdm.update(done - self._tqdm.n)

    def close(self) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._is_drawn:
            sys.stderr.write("\n")


def _tqdm(title: str, total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, file=sys.stderr)
