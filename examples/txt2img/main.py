"""A picture from a text, painted by a broker.

    luna-broker serve &
    python examples/txt2img/main.py --checkpoint sd15.safetensors --prompt "a photo of a cat" --lora ink.safetensors:0.8

The checkpoint has UNet, VAE and text encoders. Samplers and guidance are here, in sampler.py; models are in the broker.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import luna_broker
import numpy as np
from luna_broker.progress import Bar
from painter import Order, Painter
from PIL import Image
from sampler import SAMPLERS


def main() -> int:
    arguments = _parser().parse_args()
    width, height = arguments.size
    order = Order(
        prompt=arguments.prompt,
        negative=arguments.negative,
        width=width,
        height=height,
        steps=arguments.steps,
        guidance=arguments.cfg,
        seed=arguments.seed,
        sampler=arguments.sampler,
        loras=tuple(arguments.lora),
        fb_cache=arguments.fb_cache,
    )
    try:
        with luna_broker.connect(arguments.socket) as client:
            _paint(client, arguments.checkpoint, order, Path(arguments.out))
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
    print(f"{out}: {width} x {height} pixels, sampled in {picture.sampling_s:.1f} s; {picture.report}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", help="the broker's socket; without it the default one")
    parser.add_argument("--checkpoint", type=place, required=True, help="a file, or a name the broker knows")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", default="", help="what the picture is led away from")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.0, help="how strongly the prompt leads; 1 not at all")
    parser.add_argument("--size", type=size, default="512x512", help="WIDTHxHEIGHT in pixels, or one number for both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="dpmpp_2m")
    parser.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE:STRENGTH", help="may be given several times"
    )
    parser.add_argument(
        "--fb-cache", type=float, metavar="THRESHOLD", help="skip most of a step that changes less than this, as 0.1"
    )
    parser.add_argument("--out", default="txt2img.png")
    return parser


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def lora(text: str) -> tuple[str, float]:
    """`FILE:STRENGTH`, or a file alone, with a strength of one."""
    file, _, strength = text.rpartition(":")
    try:
        return (place(file), float(strength)) if file else (place(text), 1.0)
    except ValueError:
        return place(text), 1.0


def place(name: str) -> str:
    """The path of a file that is there from here; else a name for the broker to know."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


if __name__ == "__main__":
    sys.exit(main())
