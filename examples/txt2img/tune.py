"""What a block cache costs and gains for a prompt: one picture for each threshold, beside the one without a cache.

python examples/txt2img/tune.py --checkpoint sd15.safetensors --prompt "a photo of a cat" --thresholds 0.05,0.1,0.2
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import arguments
import luna_broker
from luna_broker.progress import Bar
from painter import Order, Painter, Picture

THRESHOLDS = "0.02,0.05,0.1,0.2,0.4"


@dataclass(frozen=True)
class Row:
    """A picture beside the one that is exact."""

    threshold: float | None
    psnr_db: float
    # Of a pixel's colour, in 0…1.
    largest_difference: float
    hit_rate: float
    sampling_s: float
    speed_up: float


def main() -> int:
    parser = arguments.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--thresholds", type=thresholds, default=THRESHOLDS, help="separated by commas")
    told = parser.parse_args()
    try:
        with luna_broker.connect(told.socket) as client:
            rows = tune(Painter(client, told.checkpoint), arguments.order(told), told.thresholds)
    except (luna_broker.LunaBrokerError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


def thresholds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def tune(painter: Painter, order: Order, thresholds: list[float]) -> list[Row]:
    """Paints `order` without a cache, and then with each threshold."""
    # The first steps of all load the model, which is no time of theirs.
    painter.paint(replace(order, steps=2, fb_cache=None))
    exact = _painted(painter, replace(order, fb_cache=None))
    rows = [_row(None, exact, exact, order.steps)]
    for threshold in thresholds:
        rows.append(_row(threshold, _painted(painter, replace(order, fb_cache=threshold)), exact, order.steps))
    return rows


def _painted(painter: Painter, order: Order) -> Picture:
    bar = Bar("no cache" if order.fb_cache is None else f"threshold {order.fb_cache:g}", unit=" steps")
    try:
        return painter.paint(order, bar)
    finally:
        bar.close()


def _row(threshold: float | None, picture: Picture, exact: Picture, steps: int) -> Row:
    difference = (picture.pixels.double() - exact.pixels.double()).abs()
    error = float(difference.square().mean())
    return Row(
        threshold=threshold,
        psnr_db=math.inf if error == 0 else -10 * math.log10(error),
        largest_difference=float(difference.max()),
        hit_rate=picture.hits / steps,
        sampling_s=picture.sampling_s,
        speed_up=exact.sampling_s / picture.sampling_s,
    )


def table(rows: list[Row]) -> str:
    lines = [f"{'threshold':>10}{'PSNR':>12}{'largest off':>13}{'left out':>10}{'sampling':>11}{'speed-up':>10}"]
    for row in rows:
        name = "no cache" if row.threshold is None else f"{row.threshold:g}"
        psnr = "same" if math.isinf(row.psnr_db) else f"{row.psnr_db:.1f} dB"
        lines.append(
            f"{name:>10}{psnr:>12}{row.largest_difference:>13.4f}{row.hit_rate:>10.0%}"
            f"{row.sampling_s:>9.2f} s{row.speed_up:>10.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
