"""What torch programs of this folder share: places, latents, and the do-nothing model's answer."""

from __future__ import annotations

import argparse

import torch

MODEL = "builtin:hand-off"
# A latent of 262 KB in, an image of 12.6 MB out.
LATENT = (1, 4, 128, 128)
IMAGE = (1, 1024, 1024, 3)
MARKS = 16


def arguments(what: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--broker", required=True, help="the luna-broker program")
    parser.add_argument("--place", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=200)
    return parser


def latent(place: str) -> torch.Tensor:
    """Other values than ever before."""
    return torch.rand(LATENT, device=place)


def marks(image: torch.Tensor) -> torch.Tensor:
    """The elements that the do-nothing model writes; it leaves the rest as it was."""
    flat = image.reshape(-1)
    return flat[:: flat.numel() // MARKS][:MARKS]


def wanted(latent: torch.Tensor) -> torch.Tensor:
    return latent.reshape(-1)[:MARKS]


def synchronize(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
