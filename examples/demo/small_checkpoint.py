"""A checkpoint of Stable Diffusion's layout that paints on two cores within seconds, and adapters for it.

Nothing in it was trained, so what it paints means nothing. Its UNet takes fine grain for noise and what is smooth for
the picture, which it bends by features with random weights: they see the latent, the prompt and the adapters. Its VAE
is the constructed one, with soft edges in place of hard ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import constructed
import torch
from safetensors.torch import save_file

LATENT_CHANNELS = 4
WIDTH = 64
EMBEDDING = 4 * WIDTH
CONTEXT = 64
GROUPS = 32
# The first channels carry the latent through the network: each of its channels, and the same with the sign changed. The
# activation's results for both differ by the channel itself.
CARRIED = 2 * LATENT_CHANNELS
# What share of the latent is taken for noise: more of the fine grain than of what is smooth.
GRAIN_GAIN, SMOOTH_GAIN = 1.4, 0.85
# How much features bend the picture, and how large its latent comes out.
BEND, SIZE = 0.4, 5.0

VOCABULARY, TOKENS = 49408, 77
TEXT_BLOCKS = 2

LORA_RANK = 4
LORA_SHARE = 0.7

State = dict[str, torch.Tensor]

BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))


class _Weights:
    """Tensors by name, drawn from one generator."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = torch.ones(width)
        self.state[f"{name}.bias"] = torch.zeros(width)

    def linear(self, name: str, out: int, inner: int, gain: float = 1.0, bias: bool = True) -> None:
        self.state[f"{name}.weight"] = self.draw(out, inner) * (gain / math.sqrt(inner))
        if bias:
            self.state[f"{name}.bias"] = 0.1 * self.draw(out)

    def point(self, name: str, out: int, inner: int, gain: float = 1.0) -> None:
        """A convolution that looks at single positions."""
        self.linear(name, out, inner, gain)
        self.state[f"{name}.weight"] = self.state[f"{name}.weight"][:, :, None, None]

    def smooth(self, name: str, out: int, inner: int, gain: float = 1.0) -> None:
        """A convolution that blurs, so that features are smooth whatever they are made of."""
        mix = self.draw(out, inner) * (gain / math.sqrt(inner))
        self.state[f"{name}.weight"] = mix[:, :, None, None] * BLUR
        self.state[f"{name}.bias"] = 0.1 * self.draw(out)

    def silence(self, name: str) -> None:
        """Keeps a layer's results out of the channels that carry the latent."""
        for part in ("weight", "bias"):
            self.state[f"{name}.{part}"][:CARRIED] = 0


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Writes the checkpoint, about 15 MB."""
    vae, scale = constructed.checkpoint(), torch.tensor(0.18215 / SIZE)
    for index in constructed.DECODER_DOUBLINGS:
        vae[f"taesd_decoder.{index}.weight"] = _soft(constructed.WIDTH)
    parts = {
        "model.diffusion_model.": _unet(seed),
        "cond_stage_model.transformer.text_model.": _text_encoder(seed + 1),
        "first_stage_model.": vae | {"vae_scale": scale},
    }
    save_file(
        {prefix + name: value.half().contiguous() for prefix, part in parts.items() for name, value in part.items()},
        path,
    )
    return path


def write_lora(path: Path, seed: int) -> Path:
    """Writes an adapter for all layers around attention, under kohya's names."""
    weights, state = _Weights(seed), {}
    for name, weight in _unet(0).items():
        stem = name.removesuffix(".weight")
        if ".attn" not in stem and ".ff." not in stem or stem == name:
            continue
        out, inner = weight.shape
        share = LORA_SHARE * float(weight.std()) / math.sqrt(LORA_RANK)
        key = "lora_unet_" + stem.replace(".", "_")
        state[f"{key}.lora_up.weight"] = share * weights.draw(out, LORA_RANK)
        state[f"{key}.lora_down.weight"] = weights.draw(LORA_RANK, inner)
        state[f"{key}.alpha"] = torch.tensor(float(LORA_RANK))
    save_file({name: value.half().contiguous() for name, value in state.items()}, path)
    return path


def _unet(seed: int) -> State:
    weights = _Weights(seed)
    weights.linear("time_embed.0", EMBEDDING, WIDTH)
    weights.linear("time_embed.2", EMBEDDING, EMBEDDING)
    weights.smooth("input_blocks.0.0", WIDTH, LATENT_CHANNELS, 2.0)
    weights.silence("input_blocks.0.0")
    for channel in range(LATENT_CHANNELS):
        into = weights.state["input_blocks.0.0.weight"]
        into[2 * channel, channel, 1, 1], into[2 * channel + 1, channel, 1, 1] = 1.0, -1.0
    for index in (1, 3):
        _residual(weights, f"input_blocks.{index}.0", WIDTH)
    _attention(weights, "input_blocks.3.1")
    weights.smooth("input_blocks.2.0.op", WIDTH, WIDTH)
    _residual(weights, "middle_block.0", WIDTH)
    _attention(weights, "middle_block.1")
    _residual(weights, "middle_block.2", WIDTH)
    for index in range(4):
        _residual(weights, f"output_blocks.{index}.0", 2 * WIDTH)
    # Where the latent is whole, attention would take more time than all the rest.
    for index in (0, 1):
        _attention(weights, f"output_blocks.{index}.1")
    weights.smooth("output_blocks.1.2.conv", WIDTH, WIDTH)
    _carry(weights)
    return weights.state


def _carry(weights: _Weights) -> None:
    """Brings the latent from the first convolution to the last, which takes its fine grain for the noise."""
    last = "output_blocks.3.0"
    for layer in (f"{last}.out_layers.3", f"{last}.skip_connection"):
        weights.silence(layer)
    skip = weights.state[f"{last}.skip_connection.weight"]
    for channel in range(CARRIED):
        # Behind the features comes what the first convolution left.
        skip[channel, WIDTH + channel] = 1.0
    weights.norm("out.0", WIDTH)
    weights.smooth("out.2", LATENT_CHANNELS, WIDTH, 2 * BEND)
    out = weights.state["out.2.weight"]
    noise = (SMOOTH_GAIN - GRAIN_GAIN) * BLUR
    noise[1, 1] += GRAIN_GAIN
    out[:, :CARRIED] = 0
    for channel in range(LATENT_CHANNELS):
        out[channel, 2 * channel], out[channel, 2 * channel + 1] = noise, -noise
    weights.state["out.2.bias"].zero_()


def _residual(weights: _Weights, name: str, inner: int) -> None:
    weights.norm(f"{name}.in_layers.0", inner)
    weights.smooth(f"{name}.in_layers.2", WIDTH, inner, 2.0)
    weights.linear(f"{name}.emb_layers.1", WIDTH, EMBEDDING)
    weights.norm(f"{name}.out_layers.0", WIDTH)
    weights.smooth(f"{name}.out_layers.3", WIDTH, WIDTH, 2.0)
    if inner != WIDTH:
        weights.point(f"{name}.skip_connection", WIDTH, inner)


def _attention(weights: _Weights, name: str) -> None:
    weights.norm(f"{name}.norm", WIDTH)
    weights.point(f"{name}.proj_in", WIDTH, WIDTH)
    block = f"{name}.transformer_blocks.0"
    for layer, inner in (("attn1", WIDTH), ("attn2", CONTEXT)):
        weights.linear(f"{block}.{layer}.to_q", WIDTH, WIDTH, 1.5, bias=False)
        weights.linear(f"{block}.{layer}.to_k", WIDTH, inner, 1.5, bias=False)
        weights.linear(f"{block}.{layer}.to_v", WIDTH, inner, bias=False)
        weights.linear(f"{block}.{layer}.to_out.0", WIDTH, WIDTH)
    weights.linear(f"{block}.ff.net.0.proj", 8 * WIDTH, WIDTH)
    weights.linear(f"{block}.ff.net.2", WIDTH, 4 * WIDTH)
    for layer in ("norm1", "norm2", "norm3"):
        weights.norm(f"{block}.{layer}", WIDTH)
    weights.point(f"{name}.proj_out", WIDTH, WIDTH)


def _text_encoder(seed: int) -> State:
    weights = _Weights(seed)
    weights.state["embeddings.token_embedding.weight"] = weights.draw(VOCABULARY, CONTEXT)
    weights.state["embeddings.position_embedding.weight"] = 0.3 * weights.draw(TOKENS, CONTEXT)
    for index in range(TEXT_BLOCKS):
        block = f"encoder.layers.{index}"
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{block}.self_attn.{layer}", CONTEXT, CONTEXT)
        weights.linear(f"{block}.mlp.fc1", 2 * CONTEXT, CONTEXT)
        weights.linear(f"{block}.mlp.fc2", CONTEXT, 2 * CONTEXT)
        weights.norm(f"{block}.layer_norm1", CONTEXT)
        weights.norm(f"{block}.layer_norm2", CONTEXT)
    weights.norm("final_layer_norm", CONTEXT)
    return weights.state


def _soft(width: int) -> torch.Tensor:
    weight = torch.zeros(width, width, 3, 3)
    weight[torch.arange(width), torch.arange(width)] = BLUR
    return weight
