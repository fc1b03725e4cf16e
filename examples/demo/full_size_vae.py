"""A KL autoencoder of SDXL's layout and size, with random weights: as costly as a real one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

CHANNELS = 128
MULTIPLIERS = (1, 2, 4, 4)
ENCODER_BLOCKS = 2
DECODER_BLOCKS = ENCODER_BLOCKS + 1
LATENT_CHANNELS = 4
PREFIX = "first_stage_model"

State = dict[str, torch.Tensor]


def write_full_size_vae(path: Path, seed: int = 0) -> int:
    """Writes the file, about 335 MB of float32, and returns the bytes of its tensors."""
    state: State = {}
    generator = torch.Generator().manual_seed(seed)
    widths = [CHANNELS * multiplier for multiplier in MULTIPLIERS]
    _encoder(state, widths, generator)
    _decoder(state, widths, generator)
    _convolution(state, "quant_conv", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, generator)
    _convolution(state, "post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1, generator)
    save_file({f"{PREFIX}.{key}": value for key, value in state.items()}, path)
    return sum(value.numel() * value.element_size() for value in state.values())


def _encoder(state: State, widths: list[int], generator: torch.Generator) -> None:
    _convolution(state, "encoder.conv_in", widths[0], 3, 3, generator)
    previous = widths[0]
    for level, width in enumerate(widths):
        for block in range(ENCODER_BLOCKS):
            prefix = f"encoder.down.{level}.block.{block}"
            _residual(state, prefix, width, previous, generator)
            previous = width
        if level < len(widths) - 1:
            prefix = f"encoder.down.{level}.downsample.conv"
            _convolution(state, prefix, width, width, 3, generator)
    _middle(state, "encoder.mid", widths[-1], generator)
    _norm(state, "encoder.norm_out", widths[-1])
    _convolution(state, "encoder.conv_out", 2 * LATENT_CHANNELS, widths[-1], 3, generator)


def _decoder(state: State, widths: list[int], generator: torch.Generator) -> None:
    _convolution(state, "decoder.conv_in", widths[-1], LATENT_CHANNELS, 3, generator)
    _middle(state, "decoder.mid", widths[-1], generator)
    previous = widths[-1]
    # `up` is numbered by resolution, so the decoder runs its levels from the last to the first.
    for level in reversed(range(len(widths))):
        for block in range(DECODER_BLOCKS):
            prefix = f"decoder.up.{level}.block.{block}"
            _residual(state, prefix, widths[level], previous, generator)
            previous = widths[level]
        if level > 0:
            prefix = f"decoder.up.{level}.upsample.conv"
            _convolution(state, prefix, previous, previous, 3, generator)
    _norm(state, "decoder.norm_out", widths[0])
    _convolution(state, "decoder.conv_out", 3, widths[0], 3, generator)


def _middle(state: State, prefix: str, width: int, generator: torch.Generator) -> None:
    _residual(state, f"{prefix}.block_1", width, width, generator)
    _norm(state, f"{prefix}.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        _convolution(state, f"{prefix}.attn_1.{name}", width, width, 1, generator)
    _residual(state, f"{prefix}.block_2", width, width, generator)


def _residual(state: State, prefix: str, rows: int, columns: int, generator: torch.Generator) -> None:
    _norm(state, f"{prefix}.norm1", columns)
    _convolution(state, f"{prefix}.conv1", rows, columns, 3, generator)
    _norm(state, f"{prefix}.norm2", rows)
    _convolution(state, f"{prefix}.conv2", rows, rows, 3, generator)
    if rows != columns:
        _convolution(state, f"{prefix}.nin_shortcut", rows, columns, 1, generator)


def _norm(state: State, prefix: str, width: int) -> None:
    state[f"{prefix}.weight"] = torch.ones(width)
    state[f"{prefix}.bias"] = torch.zeros(width)


def _convolution(
    state: State,
    prefix: str,
    rows: int,
    columns: int,
    kernel: int,
    generator: torch.Generator,
) -> None:
    # Scaled by the fan-in: activations stay finite through thirty layers of random weights.
    scale = (columns * kernel * kernel) ** -0.5
    weight = torch.empty(rows, columns, kernel, kernel)
    state[f"{prefix}.weight"] = weight.uniform_(-scale, scale, generator=generator)
    state[f"{prefix}.bias"] = torch.zeros(rows)
