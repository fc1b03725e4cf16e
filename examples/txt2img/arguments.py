"""What the programs of this example are told on the command line."""

from __future__ import annotations

import argparse

from painter import Order
from sampler import SAMPLERS


def parser(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--socket", help="the broker's socket; without it the default one")
    parser.add_argument("--checkpoint", required=True, help="a file, or a name the broker knows")
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
    return parser


def order(arguments: argparse.Namespace) -> Order:
    width, height = arguments.size
    return Order(
        prompt=arguments.prompt,
        negative=arguments.negative,
        width=width,
        height=height,
        steps=arguments.steps,
        guidance=arguments.cfg,
        seed=arguments.seed,
        sampler=arguments.sampler,
        loras=tuple(arguments.lora),
    )


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def lora(text: str) -> tuple[str, float]:
    """`FILE:STRENGTH`, or a file alone, with a strength of one."""
    file, _, strength = text.rpartition(":")
    try:
        return (file, float(strength)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0
