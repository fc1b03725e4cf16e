"""What the programs about SDXL share: sizes by place, files, inputs, likeness, and time taken turn by turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import hand_offs
import sdxl_checkpoint
import torch
import weight_file
from hand_offs import synchronize
from sdxl_unet import FULL, PREFIX, SMALL, SdxlUnet, filled

# Relative L2 distance to float32 of one forward: in float16 on a GPU, in float32 on the CPU.
TOLERANCE = {"cuda": 5e-3, "cpu": 1e-4}
# The prompt's and the negative one's.
ROWS = 2
TOKENS = 77
WARM_UP = 3

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def arguments(what: str | None) -> argparse.ArgumentParser:
    parser = hand_offs.arguments(what)
    parser.set_defaults(rounds=20)
    parser.add_argument("--size", choices=["full", "small"], help="full on a GPU, small on the CPU, unless it is said")
    parser.add_argument("--folder", type=Path, required=True, help="where the weights are, or are made")
    return parser


class Scene:
    """On a GPU the full size at 1024 x 1024 pixels in float16; on the CPU the same with a small model."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.broker, self.place, self.folder, self.rounds = chosen.broker, chosen.place, chosen.folder, chosen.rounds
        self.size = chosen.size or ("full" if self.place == "cuda" else "small")
        self.sizes, self.side = (FULL, 128) if self.size == "full" else (SMALL, 8)
        # As the broker computes there.
        self.dtype = torch.float16 if self.place == "cuda" else torch.float32
        self.unet, self.text, self.vae = (self.folder / f"sdxl-{part}.safetensors" for part in ("unet", "text", "vae"))
        torch.set_grad_enabled(False)

    def write_unet(self) -> dict:
        return sdxl_checkpoint.made(self.unet, sdxl_checkpoint.unet_shapes(self.sizes), self.place, 1)

    def write_text(self) -> dict:
        return sdxl_checkpoint.made(self.text, sdxl_checkpoint.text_shapes(self.sizes), self.place, 2)

    def write_vae(self) -> dict:
        return sdxl_checkpoint.made(self.vae, sdxl_checkpoint.vae_shapes(self.sizes), self.place, 3)

    def write_adapter(self, rank: int, seed: int) -> Path:
        path = self.folder / f"sdxl-rank{rank}-{seed}.safetensors"
        sdxl_checkpoint.made(path, sdxl_checkpoint.adapter_shapes(self.sizes, rank), self.place, seed)
        return path

    def own_unet(self, dtype: torch.dtype | None = None) -> SdxlUnet:
        """A UNet with a copy of the weights that is this process's own."""
        weights = weight_file.read(self.unet, self.place)
        return filled(self.sizes, {key: tensor.to(dtype or self.dtype) for key, tensor in weights.items()})

    def given(self, rows: int = ROWS, side: int | None = None, seed: int = 1, place: str | None = None) -> Given:
        """Inputs of one forward."""
        generator = torch.Generator().manual_seed(seed)
        side = side or self.side

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(place or self.place, self.dtype)

        x, context = draw(rows, self.sizes.channels, side, side), draw(rows, TOKENS, self.sizes.context)
        timesteps = torch.full((rows,), 500.0, device=place or self.place)
        return x, timesteps, context, draw(rows, self.sizes.vector)

    def is_right(self, distance: float) -> bool:
        return distance <= TOLERANCE[self.place]


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of the whole; infinite where anything is no number."""
    wanted = wanted.double().cpu()
    found = ((out.double().cpu() - wanted).norm() / wanted.norm()).item()
    return round(found, 7) if found < float("inf") else float("inf")


def in_turn(
    ways: dict[str, Callable[[], object]], place: str, rounds: int, warm_up: int = WARM_UP, begin_anywhere: bool = True
) -> dict[str, list[tuple[float, float]]]:
    """Seconds until each way returns and until the GPU is done with it too, round by round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for at in range(warm_up + rounds):
        first = at % len(names) if begin_anywhere else 0
        for name in names[first:] + names[:first]:
            synchronize(place)
            began = time.perf_counter()
            kept = ways[name]()
            returned = time.perf_counter()
            synchronize(place)
            times[name].append((returned - began, time.perf_counter() - began))
            del kept
    return {name: taken[warm_up:] for name, taken in times.items()}


def rows_of(times: dict[str, list[tuple[float, float]]], baseline: str) -> list[dict]:
    """A table's rows; ratios are medians of the rounds' own."""

    def row(name: str) -> dict:
        done = [taken for _, taken in times[name]]
        return {
            "way": name,
            "median_ms": milliseconds(done),
            "least_ms": round(min(done) * 1e3, 3),
            "until_it_returns_ms": milliseconds([returned for returned, _ in times[name]]),
            f"of {baseline}": ratio(times, name, baseline),
        }

    return [row(name) for name in times]


def ratio(times: dict[str, list[tuple[float, float]]], name: str, baseline: str) -> float:
    pairs = zip(times[name], times[baseline], strict=True)
    return round(statistics.median(own / other for (_, own), (_, other) in pairs), 4)


def milliseconds(times: list[float]) -> float:
    return round(statistics.median(times) * 1e3, 3)


def weights_in(unet: SdxlUnet) -> dict[str, torch.Tensor]:
    """A UNet's very tensors, called as in a checkpoint."""
    return {PREFIX + key: tensor for key, tensor in unet.state_dict().items()}
