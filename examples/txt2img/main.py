"""A picture from a text, painted by a broker.

    luna-broker serve &
    python examples/txt2img/main.py --checkpoint sd15.safetensors --prompt "a photo of a cat" --lora ink.safetensors:0.8

The checkpoint has UNet, VAE and text encoders. Samplers and guidance are here, in sampler.py; models are in the broker.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import arguments
import luna_broker
import numpy as np
from luna_broker.progress import Bar
from painter import Order, Painter
from PIL import Image


def main() -> int:
    parser = arguments.parser((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fb-cache", type=float, metavar="THRESHOLD", help="skip most of a step that changes less than this, as 0.1"
    )
    parser.add_argument("--out", default="txt2img.png")
    told = parser.parse_args()
    order = replace(arguments.order(told), fb_cache=told.fb_cache)
    try:
        with luna_broker.connect(told.socket) as client:
            _paint(client, told.checkpoint, order, Path(told.out))
    except (luna_broker.LunaBrokerError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _paint(client: luna_broker.Client, checkpoint: str, order: Order, out: Path) -> None:
    painter = Painter(client, checkpoint)
    bar = Bar(f"{order.sampler}, {order.steps} steps", unit=" steps")
    try:
        picture = painter.paint(order, bar)
    finally:
        bar.close()
    Image.fromarray((picture.pixels.numpy() * 255).round().astype(np.uint8)).save(out)
    height, width, _ = picture.pixels.shape
    left_out = f", {picture.hits} of {order.steps} steps left out" if order.fb_cache is not None else ""
    print(f"{out}: {width} x {height} pixels, sampled in {picture.sampling_s:.1f} s{left_out}")


if __name__ == "__main__":
    sys.exit(main())
