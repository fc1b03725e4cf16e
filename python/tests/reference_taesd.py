"""TAESD written down once more, in torch and as plainly as possible, to compare the broker with.

`state` is the content of a checkpoint with keys `taesd_encoder.*` and `taesd_decoder.*`.
Images are float32 [N, H, W, 3] in 0..1, latents float32 [N, C, h, w], unscaled.
"""

from __future__ import annotations

import torch
from torch.nn import functional

State = dict[str, torch.Tensor]

ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
HALVINGS = (2, 6, 10)
DOUBLINGS = (7, 12, 17)
WIDTH = 64


def encode(state: State, image: torch.Tensor, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """The latent of an image whose sides are multiples of eight."""
    x = image.movedim(-1, 1).float()
    for index in range(15):
        name = f"taesd_encoder.{index}"
        if index in ENCODER_BLOCKS:
            x = _block(state, name, x)
        else:
            x = _convolve(state, name, x, stride=2 if index in HALVINGS else 1)
    return x / scale + shift


def decode(state: State, latent: torch.Tensor, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """The image of a latent, clamped to 0..1."""
    x = torch.tanh((latent.float() - shift) * scale / 3) * 3
    x = _convolve(state, "taesd_decoder.1", x).relu()
    for index in range(3, 20):
        name = f"taesd_decoder.{index}"
        if index in DECODER_BLOCKS:
            x = _block(state, name, x)
        elif index in DOUBLINGS:
            x = _convolve(state, name, functional.interpolate(x, scale_factor=2, mode="nearest"))
    x = _convolve(state, "taesd_decoder.19", x)
    return x.clamp(0, 1).movedim(1, -1)


def random_state(latent_channels: int, seed: int) -> State:
    """Untrained weights that keep activations near one, so that no layer's error is hidden."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def convolution(name: str, rows: int, columns: int, gain: float, bias: bool = True) -> None:
        scale = gain * (3 / (columns * 9)) ** 0.5
        weight = torch.empty(rows, columns, 3, 3)
        state[f"{name}.weight"] = weight.uniform_(-scale, scale, generator=generator)
        if bias:
            state[f"{name}.bias"] = torch.empty(rows).uniform_(-0.1, 0.1, generator=generator)

    for part, first, last, last_index, blocks, resampling in (
        ("encoder", 3, latent_channels, 14, ENCODER_BLOCKS, HALVINGS),
        ("decoder", latent_channels, 3, 19, DECODER_BLOCKS, DOUBLINGS),
    ):
        convolution(f"taesd_{part}.{0 if part == 'encoder' else 1}", WIDTH, first, 1.0)
        for index in blocks:
            for layer in (0, 2, 4):
                convolution(f"taesd_{part}.{index}.conv.{layer}", WIDTH, WIDTH, 0.7)
        for index in resampling:
            convolution(f"taesd_{part}.{index}", WIDTH, WIDTH, 1.0, bias=False)
        convolution(f"taesd_{part}.{last_index}", last, WIDTH, 0.3)
    # Around mid-grey, where the clamp to 0..1 cannot hide a difference.
    state["taesd_decoder.19.bias"] += 0.5
    return state


def _convolve(state: State, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    weight = state[f"{name}.weight"].float()
    bias = state.get(f"{name}.bias")
    bias = None if bias is None else bias.float()
    return functional.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)


def _block(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    if f"{name}.pool.0.weight" in state:
        x = x + _pool(state, f"{name}.pool", x)
    y = _convolve(state, f"{name}.conv.0", x).relu()
    y = _convolve(state, f"{name}.conv.2", y).relu()
    y = _convolve(state, f"{name}.conv.4", y)
    if f"{name}.skip.weight" in state:
        x = _convolve(state, f"{name}.skip", x)
    return (x + y).relu()


def _pool(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    y = _convolve(state, f"{name}.0", x)
    scale, bias = state[f"{name}.1.weight"].float(), state[f"{name}.1.bias"].float()
    y = functional.group_norm(y, 4, scale, bias).relu()
    return _convolve(state, f"{name}.3", y)
