"""The picture that workflows start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from workflows import HEIGHT, PICTURE, WIDTH


def write(folder: Path) -> None:
    """Writes smooth colours with a transparent place, which is the mask of inpainting, as `PICTURE`."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    colours = [np.sin(6 * rows + shift) * np.cos(9 * columns - shift) for shift in (0.0, 1.0, 2.0)]
    opaque = np.ones((HEIGHT, WIDTH))
    opaque[HEIGHT // 4 : HEIGHT // 2, WIDTH // 3 : WIDTH // 2] = 0
    channels = [127.5 + 127.5 * colour for colour in colours] + [255 * opaque]
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8), "RGBA").save(folder / PICTURE)
