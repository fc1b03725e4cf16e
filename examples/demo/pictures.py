"""Pictures in and out: reading one, comparing two, and the sheet that shows them side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE_PX = 256
MARGIN_PX = 12
CAPTION_PX = 24
FONT_PX = 14
PAPER = (250, 250, 248)
INK = (30, 30, 30)

# The broker crops to a multiple of the model's ratio, centred; cropping here the same way first
# gives the comparison its counterpart.
RATIO = 8


def read(path: Path, longest_side_px: int) -> np.ndarray:
    """A picture from a file as float32 [H, W, 3] in 0..1, scaled down where it is too large."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((longest_side_px, longest_side_px), Image.Resampling.LANCZOS)
    return crop(np.asarray(image, dtype=np.float32) / 255)


def crop(image: np.ndarray) -> np.ndarray:
    """The centre of [H, W, 3] whose sides are multiples of eight."""
    height, width = (side // RATIO * RATIO for side in image.shape[:2])
    if height == 0 or width == 0:
        raise ValueError(f"the picture is smaller than {RATIO} x {RATIO} pixels")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in 0..1."""
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def write_contact_sheet(path: Path, rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> None:
    """Writes rows of captioned pictures, float32 [H, W, 3]."""
    columns, row_px = max(len(row) for row in rows), TILE_PX + CAPTION_PX + MARGIN_PX
    sheet = Image.new("RGB", (MARGIN_PX + columns * (TILE_PX + MARGIN_PX), MARGIN_PX + len(rows) * row_px), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for at, row in enumerate(rows):
        top = MARGIN_PX + at * row_px
        for position, (caption, pixels) in enumerate(row):
            left = MARGIN_PX + position * (TILE_PX + MARGIN_PX)
            tile = _tile(pixels)
            sheet.paste(tile, (left + (TILE_PX - tile.width) // 2, top + (TILE_PX - tile.height) // 2))
            below = (left + TILE_PX // 2, top + TILE_PX + CAPTION_PX // 2)
            draw.text(below, caption, fill=INK, font=font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _tile(pixels: np.ndarray) -> Image.Image:
    tile = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    scale = TILE_PX / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile if size == tile.size else tile.resize(size, Image.Resampling.LANCZOS)
