"""Makes a UNet of random weights remove noise, as a trained one does.

Without that, what it paints is the noise it was given: latents a hundred times too large, pictures all black and white,
in which no tolerance means anything. The first channels carry the input past everything to the output, where
activation and normalisation undo themselves; all other channels stay as they are and paint on top.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

LATENT = 4
# Of a group normalisation with 32 groups, which must hold nothing but what is carried.
GROUPS = 32
# How much of the random channels is seen in the output.
PAINT = 0.1

Weights = dict[str, np.ndarray]


def teach(file: Path, prefix: str) -> None:
    """Rewrites a checkpoint whose UNet's keys begin with `prefix`."""
    weights = load_file(file)
    _carry_in(weights, f"{prefix}input_blocks.0.0")
    last = max(int(key.split(".")[-1]) for key in _heads(weights, f"{prefix}output_blocks."))
    _carry_through(weights, f"{prefix}output_blocks.{last}", _channels(weights, prefix))
    _carry_out(weights, f"{prefix}out.2", _channels(weights, prefix))
    save_file(weights, file, {"about": "random weights, for tests"})


def _channels(weights: Weights, prefix: str) -> int:
    return int(weights[f"{prefix}out.2.weight"].shape[1])


def _heads(weights: Weights, start: str) -> set[str]:
    return {start + key[len(start) :].split(".")[0] for key in weights if key.startswith(start)}


def _carry_in(weights: Weights, layer: str) -> None:
    """Channels 0 to 3 of the first layer are the latent, the next four its negative."""
    weight = weights[f"{layer}.weight"]
    width = weight.shape[0] // GROUPS
    weight[:width] = 0
    weights[f"{layer}.bias"][:width] = 0
    for channel in range(LATENT):
        weight[channel, channel, 1, 1] = 1
        weight[LATENT + channel, channel, 1, 1] = -1


def _carry_through(weights: Weights, block: str, channels: int) -> None:
    """The last block, which is given the first layer's output behind its own input, adds nothing to those channels."""
    width = channels // GROUPS
    skip = weights[f"{block}.0.skip_connection.weight"]
    skip[:width] = 0
    for channel in range(2 * LATENT):
        skip[channel, skip.shape[1] - channels + channel, 0, 0] = 1
    silent = [f"{block}.0.skip_connection.bias"]
    for layer in (f"{block}.0.out_layers.3", f"{block}.1.proj_out"):
        silent += [key for key in (f"{layer}.weight", f"{layer}.bias") if key in weights]
    for key in silent:
        weights[key][:width] = 0


def _carry_out(weights: Weights, layer: str, channels: int) -> None:
    """The latent is the activation of each channel less that of its negative."""
    weight = weights[f"{layer}.weight"]
    weight *= PAINT
    weight[:, : channels // GROUPS] = 0
    for channel in range(LATENT):
        weight[channel, channel, 1, 1] = 1
        weight[channel, LATENT + channel, 1, 1] = -1
