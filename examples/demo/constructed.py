"""A picture and a checkpoint made from arithmetic, for machines that have no model file at hand.

The checkpoint has the TAESD layout (four latent channels, 64 wide) but was never trained. Its
encoder averages blocks of 8 x 8 pixels; its decoder paints each block in that average. A round
trip through it is therefore known in advance, which a trained model's is not.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WIDTH = 64
LATENT_CHANNELS = 4
COLOURS = 3
BLOCK = 8

# Each colour gets an equal share of the hidden channels for its piecewise linear correction.
KNOTS_PER_COLOUR = WIDTH // COLOURS

_ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
_ENCODER_HALVINGS = (2, 6, 10)
_DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
DECODER_DOUBLINGS = (7, 12, 17)

State = dict[str, torch.Tensor]


def picture(size_px: int = 512) -> np.ndarray:
    """A colourful square picture, float32 [size_px, size_px, 3] in 0..1."""
    y, x = np.meshgrid(np.linspace(0, 1, size_px), np.linspace(0, 1, size_px), indexing="ij")
    image = np.stack([0.15 + 0.7 * x, 0.2 + 0.6 * y, 0.85 - 0.5 * x * y], axis=-1)
    stripes = ((x + 0.5 * y) * 10).astype(int) % 2 == 1
    image[(y > 0.68) & stripes] *= 0.55
    discs = (
        (0.25, 0.30, 0.17, (0.95, 0.30, 0.20)),
        (0.40, 0.38, 0.13, (0.98, 0.80, 0.15)),
        (0.70, 0.28, 0.20, (0.10, 0.45, 0.70)),
        (0.76, 0.34, 0.09, (0.95, 0.95, 0.90)),
        (0.55, 0.72, 0.16, (0.20, 0.65, 0.35)),
    )
    for centre_x, centre_y, radius, colour in discs:
        image[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] = colour
    return image.astype(np.float32)


def block_average(image: np.ndarray) -> np.ndarray:
    """What the round trip gives back: every 8 x 8 block of [H, W, 3] in its mean colour."""
    height, width, colours = image.shape
    blocks = image.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, colours)
    mean = blocks.mean(axis=(1, 3), dtype=np.float64)
    whole: np.ndarray = mean.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1).astype(np.float32)
    return whole


def write_checkpoint(path: Path) -> Path:
    """Writes the constructed checkpoint, about 10 MB, and returns its path.

    The file's name must contain no name of a trained family: the broker takes the latent scale
    from it, and this model has none.
    """
    save_file(checkpoint(), path)
    return path


def checkpoint() -> State:
    """The tensors of the constructed checkpoint, float32, LDM's sequential keys."""
    state: State = {}
    _encoder(state)
    _decoder(state)
    return state


def _encoder(state: State) -> None:
    prefix = "taesd_encoder"
    _convolution(state, f"{prefix}.0", _pass_through(WIDTH, COLOURS))
    for index in _ENCODER_BLOCKS:
        _identity_block(state, f"{prefix}.{index}")
    averaging = torch.zeros(WIDTH, WIDTH, 3, 3)
    for channel in range(COLOURS):
        # With stride 2 and padding 1 the last two taps of each axis are one block of 2 x 2.
        averaging[channel, channel, 1:, 1:] = 0.25
    for index in _ENCODER_HALVINGS:
        state[f"{prefix}.{index}.weight"] = averaging.clone()
    to_latent = torch.zeros(LATENT_CHANNELS, WIDTH, 3, 3)
    for channel in range(COLOURS):
        to_latent[channel, channel, 1, 1] = 2.0
    # The fourth channel carries the grey value, so that no latent channel is constant.
    to_latent[COLOURS, :COLOURS, 1, 1] = 2.0 / COLOURS
    _convolution(state, f"{prefix}.14", to_latent, torch.full((LATENT_CHANNELS,), -1.0))


def _decoder(state: State) -> None:
    prefix = "taesd_decoder"
    from_latent = torch.zeros(WIDTH, LATENT_CHANNELS, 3, 3)
    bias = torch.zeros(WIDTH)
    for channel in range(COLOURS):
        # Back into 0..1 before the first ReLU, which would cut the dark half of the latent off.
        from_latent[channel, channel, 1, 1] = 0.5
        bias[channel] = 0.5
    _convolution(state, f"{prefix}.1", from_latent, bias)
    for index in _DECODER_BLOCKS:
        _identity_block(state, f"{prefix}.{index}")
    _undo_clamp(state, f"{prefix}.{_DECODER_BLOCKS[0]}")
    for index in DECODER_DOUBLINGS:
        state[f"{prefix}.{index}.weight"] = _pass_through(WIDTH, WIDTH)
    _convolution(state, f"{prefix}.19", _pass_through(COLOURS, WIDTH))


def _undo_clamp(state: State, prefix: str) -> None:
    """Makes a residual block add what 3 * tanh(z / 3) at the decoder's entry took away.

    The correction is piecewise linear: one hidden channel per knot, each a ReLU shifted to its
    knot and weighted with the change of slope there.
    """
    edge = 3 * math.tanh(1 / 3)
    low, high = (1 - edge) / 2, (1 + edge) / 2
    knots = torch.linspace(low, high, KNOTS_PER_COLOUR + 1, dtype=torch.float64)
    clamped = (2 * knots - 1) / 3
    correction = (3 * torch.atanh(clamped) + 1) / 2 - knots
    slopes = correction.diff() / knots.diff()
    changes = torch.cat([slopes[:1], slopes.diff()])
    into, out_of = torch.zeros(WIDTH, WIDTH, 3, 3), torch.zeros(WIDTH, WIDTH, 3, 3)
    into_bias, out_bias = torch.zeros(WIDTH), torch.zeros(WIDTH)
    for colour in range(COLOURS):
        hidden = slice(colour * KNOTS_PER_COLOUR, (colour + 1) * KNOTS_PER_COLOUR)
        into[hidden, colour, 1, 1] = 1.0
        into_bias[hidden] = -knots[:-1].float()
        out_of[colour, hidden, 1, 1] = changes.float()
        out_bias[colour] = correction[0].float()
    _convolution(state, f"{prefix}.conv.0", into, into_bias)
    _convolution(state, f"{prefix}.conv.2", _pass_through(WIDTH, WIDTH))
    _convolution(state, f"{prefix}.conv.4", out_of, out_bias)


def _identity_block(state: State, prefix: str) -> None:
    for index in (0, 2, 4):
        _convolution(state, f"{prefix}.conv.{index}", torch.zeros(WIDTH, WIDTH, 3, 3))


def _pass_through(rows: int, columns: int) -> torch.Tensor:
    weight = torch.zeros(rows, columns, 3, 3)
    for channel in range(min(rows, columns)):
        weight[channel, channel, 1, 1] = 1.0
    return weight


def _convolution(state: State, prefix: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    state[f"{prefix}.weight"] = weight
    state[f"{prefix}.bias"] = torch.zeros(weight.shape[0]) if bias is None else bias
