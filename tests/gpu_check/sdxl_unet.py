"""SDXL's UNet as a torch module whose parameters have the names of single-file checkpoints.

What the broker's UNet is held against where there is no diffusers, and what workers compute with themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

# What the names in a checkpoint begin with.
PREFIX = "model.diffusion_model."
GROUPS = 32
HEAD = 64


@dataclass(frozen=True)
class Sizes:
    """What tells one UNet of this make from another."""

    base: int
    widths: tuple[int, ...]  # per level, as a multiple of `base`
    depths: tuple[int, ...]  # of attention, per level; that of the last in the middle too
    context: int
    vector: int
    blocks: int = 2
    channels: int = 4


FULL = Sizes(320, (1, 2, 4), (0, 2, 10), 2048, 2816)
# Everything that the full size has, in two million numbers.
SMALL = Sizes(64, (1, 2), (0, 1), 128, 80, blocks=1)


class ResBlock(nn.Module):
    def __init__(self, inner: int, out: int, embed: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, inner), nn.SiLU(), nn.Conv2d(inner, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, out))
        conv = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), conv)
        self.skip_connection = nn.Identity() if inner == out else nn.Conv2d(inner, out, 1)

    def forward(self, x: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(embed)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        def heads(h: torch.Tensor) -> torch.Tensor:
            return h.unflatten(2, (-1, HEAD)).transpose(1, 2)

        h = scaled_dot_product_attention(heads(self.to_q(x)), heads(self.to_k(source)), heads(self.to_v(source)))
        return self.to_out(h.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, gate = self.proj(x).chunk(2, -1)
        return h * gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, width: int, context: int, depth: int) -> None:
        super().__init__()
        # Not the 1e-5 of all others.
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context) for _ in range(depth))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        # To what it is joined with: a latent whose sides are odd is not doubled.
        return self.conv(interpolate(x, size=size, mode="nearest"))


class SdxlUnet(nn.Module):
    """Takes what a broker's UNet takes: x, timesteps, context, y."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        embed, width = 4 * sizes.base, sizes.base

        def res(inner: int, out: int, depth: int) -> nn.ModuleList:
            attends = [Transformer(out, sizes.context, depth)] if depth else []
            return nn.ModuleList([ResBlock(inner, out, embed), *attends])

        self.time_embed = nn.Sequential(nn.Linear(width, embed), nn.SiLU(), nn.Linear(embed, embed))
        vector = nn.Sequential(nn.Linear(sizes.vector, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label_emb = nn.Sequential(vector)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(sizes.channels, width, 3, padding=1)])])
        levels = [(sizes.base * factor, depth) for factor, depth in zip(sizes.widths, sizes.depths, strict=True)]
        skips = [width]
        for level, (out, depth) in enumerate(levels):
            for _ in range(sizes.blocks):
                self.input_blocks.append(res(width, out, depth))
                width = out
                skips.append(width)
            if level + 1 < len(levels):
                self.input_blocks.append(nn.ModuleList([Down(width)]))
                skips.append(width)
        middle = Transformer(width, sizes.context, sizes.depths[-1])
        self.middle_block = nn.ModuleList([ResBlock(width, width, embed), middle, ResBlock(width, width, embed)])
        self.output_blocks = nn.ModuleList()
        for level, (out, depth) in reversed(list(enumerate(levels))):
            for at in range(sizes.blocks + 1):
                block = res(width + skips.pop(), out, depth)
                width = out
                if level and at == sizes.blocks:
                    block.append(Up(width))
                self.output_blocks.append(block)
        last = nn.Conv2d(width, sizes.channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), last)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        embed = self.time_embed(waves(timesteps, self.sizes.base).to(x.dtype)) + self.label_emb(y)
        skips, h = [], x
        for block in self.input_blocks:
            h = run(block, h, embed, context)
            skips.append(h)
        h = run(self.middle_block, h, embed, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], 1)
            h = run(block, h, embed, context, skips[-1].shape[2:] if skips else None)
        return self.out(h)


def run(block: nn.ModuleList, h: torch.Tensor, embed: torch.Tensor, context: torch.Tensor, size=None) -> torch.Tensor:
    for layer in block:
        if isinstance(layer, ResBlock):
            h = layer(h, embed)
        elif isinstance(layer, Transformer):
            h = layer(h, context)
        else:
            h = layer(h, size) if isinstance(layer, Up) else layer(h)
    return h


def waves(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines, then sines: in float32, as half precision cannot tell neighbouring steps apart."""
    rates = torch.exp(-math.log(10_000) / (width // 2) * torch.arange(width // 2, device=timesteps.device))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def bare(sizes: Sizes, dtype: torch.dtype) -> SdxlUnet:
    """A UNet without memory for its parameters."""
    with torch.device("meta"):
        return SdxlUnet(sizes).to(dtype).eval().requires_grad_(False)


def filled(sizes: Sizes, weights: dict[str, torch.Tensor]) -> SdxlUnet:
    """A UNet that has these very tensors, which are called as in a checkpoint, for its parameters."""
    own = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    unet = bare(sizes, next(iter(own.values())).dtype)
    unet.load_state_dict(own, assign=True)
    return unet.requires_grad_(False)
