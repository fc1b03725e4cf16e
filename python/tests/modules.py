"""Modules that tests give attached weights to, and what they are compared by."""

from __future__ import annotations

from pathlib import Path

import luna_broker
import pytest
import torch
from luna_broker.torch import skeleton
from safetensors.torch import save_file
from torch import nn


class Tied(nn.Module):
    """Embedding and head share their weight, and a buffer is in no file."""

    ids: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(10), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(self.ids[tokens])) * self.scale)


TOKENS = torch.tensor([[1, 2, 3]])


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
    )
    return CLIPTextModel(config).eval()


def tied_text_model() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def run_unet(module: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return module(latent, 7, context).sample


def run_text_encoder(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(12).reshape(2, 6)).last_hidden_state


def run_tied_text_model(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


REAL = [
    pytest.param(unet, run_unet, id="UNet2DConditionModel"),
    pytest.param(text_encoder, run_text_encoder, id="CLIPTextModel"),
    pytest.param(tied_text_model, run_tied_text_model, id="T5ForConditionalGeneration"),
]


def write(module: nn.Module, path: Path, leave_out: str | None = None) -> Path:
    """What a library saves: each parameter once, under the first of its names."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name != leave_out:
            tensors[name] = tensor.detach().contiguous()
        seen.add(id(tensor))
    save_file(tensors, path)
    return path


def private_bytes(module: nn.Module, weights: luna_broker.Weights) -> int:
    start, end = weights._held().span
    tensors = [*module.parameters(), *module.state_dict().values()]
    return sum(tensor.nbytes for tensor in tensors if not start <= tensor.data_ptr() < end)


def empty() -> Tied:
    with skeleton():
        return Tied().eval()
