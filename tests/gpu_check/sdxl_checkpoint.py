"""Files of SDXL's layout and of random content, made where they are used: six gigabytes travel nowhere.

Each part is in a file of its own, under the names that it has in a checkpoint that holds all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import weight_file
from sdxl_unet import FULL, PREFIX, SMALL, Sizes, bare
from weight_file import Shape

VOCABULARY, POSITIONS = 49408, 77
TEXT_L, TEXT_G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
VAE = "first_stage_model."


@dataclass(frozen=True)
class Others:
    """What tells the parts beside the UNet from others of their make."""

    text_l: tuple[int, int]  # width and layers
    text_g: tuple[int, int]
    vae: int  # channels at full size
    vae_widths: tuple[int, ...]


OTHERS = {
    FULL: Others((768, 12), (1280, 32), 128, (1, 2, 4, 4)),
    SMALL: Others((64, 1), (64, 1), 32, (1, 2)),
}


def unet_shapes(sizes: Sizes) -> dict[str, Shape]:
    return {PREFIX + key: tuple(tensor.shape) for key, tensor in bare(sizes, torch.float16).state_dict().items()}


class _Shapes(dict[str, Shape]):
    def both(self, stem: str, *shape: int) -> None:
        self[f"{stem}.weight"], self[f"{stem}.bias"] = shape, shape[:1]

    def text_l(self, root: str, width: int, layers: int) -> None:
        self[f"{root}embeddings.token_embedding.weight"] = (VOCABULARY, width)
        self[f"{root}embeddings.position_embedding.weight"] = (POSITIONS, width)
        for layer in (f"{root}encoder.layers.{at}" for at in range(layers)):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.both(f"{layer}.self_attn.{name}", width, width)
            self.both(f"{layer}.mlp.fc1", 4 * width, width)
            self.both(f"{layer}.mlp.fc2", width, 4 * width)
            self.both(f"{layer}.layer_norm1", width)
            self.both(f"{layer}.layer_norm2", width)
        self.both(f"{root}final_layer_norm", width)

    def text_g(self, root: str, width: int, layers: int) -> None:
        self[f"{root}token_embedding.weight"] = (VOCABULARY, width)
        self[f"{root}positional_embedding"] = (POSITIONS, width)
        for layer in (f"{root}transformer.resblocks.{at}" for at in range(layers)):
            self[f"{layer}.attn.in_proj_weight"], self[f"{layer}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
            self.both(f"{layer}.attn.out_proj", width, width)
            self.both(f"{layer}.mlp.c_fc", 4 * width, width)
            self.both(f"{layer}.mlp.c_proj", width, 4 * width)
            self.both(f"{layer}.ln_1", width)
            self.both(f"{layer}.ln_2", width)
        self.both(f"{root}ln_final", width)
        self[f"{root}text_projection"] = (width, width)

    def vae(self, root: str, base: int, widths: tuple[int, ...]) -> None:
        levels, deepest = [base * width for width in widths], base * widths[-1]
        self.both(f"{root}encoder.conv_in", base, 3, 3, 3)
        inner = base
        for level, out in enumerate(levels):
            for at in range(2):
                self._block(f"{root}encoder.down.{level}.block.{at}", inner, out)
                inner = out
            if level + 1 < len(levels):
                self.both(f"{root}encoder.down.{level}.downsample.conv", out, out, 3, 3)
        self._middle(f"{root}encoder", deepest)
        self.both(f"{root}encoder.norm_out", deepest)
        self.both(f"{root}encoder.conv_out", 8, deepest, 3, 3)
        self.both(f"{root}quant_conv", 8, 8, 1, 1)
        self.both(f"{root}post_quant_conv", 4, 4, 1, 1)
        self.both(f"{root}decoder.conv_in", deepest, 4, 3, 3)
        self._middle(f"{root}decoder", deepest)
        for level, out in reversed(list(enumerate(levels))):
            for at in range(3):
                self._block(f"{root}decoder.up.{level}.block.{at}", inner, out)
                inner = out
            if level:
                self.both(f"{root}decoder.up.{level}.upsample.conv", out, out, 3, 3)
        self.both(f"{root}decoder.norm_out", base)
        self.both(f"{root}decoder.conv_out", 3, base, 3, 3)

    def _block(self, stem: str, inner: int, out: int) -> None:
        self.both(f"{stem}.norm1", inner)
        self.both(f"{stem}.conv1", out, inner, 3, 3)
        self.both(f"{stem}.norm2", out)
        self.both(f"{stem}.conv2", out, out, 3, 3)
        if inner != out:
            self.both(f"{stem}.nin_shortcut", out, inner, 1, 1)

    def _middle(self, stem: str, width: int) -> None:
        self._block(f"{stem}.mid.block_1", width, width)
        self.both(f"{stem}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            self.both(f"{stem}.mid.attn_1.{name}", width, width, 1, 1)
        self._block(f"{stem}.mid.block_2", width, width)


def text_shapes(sizes: Sizes) -> dict[str, Shape]:
    shapes = _Shapes()
    shapes.text_l(TEXT_L, *OTHERS[sizes].text_l)
    shapes.text_g(TEXT_G, *OTHERS[sizes].text_g)
    return shapes


def vae_shapes(sizes: Sizes) -> dict[str, Shape]:
    shapes = _Shapes()
    shapes.vae(VAE, OTHERS[sizes].vae, OTHERS[sizes].vae_widths)
    return shapes


def adapter_shapes(sizes: Sizes, rank: int) -> dict[str, Shape]:
    """A LoRA for every linear layer of attention, as kohya's trainer names them."""
    shapes: dict[str, Shape] = {}
    for key, shape in unet_shapes(sizes).items():
        if (".attn1." in key or ".attn2." in key) and len(shape) == 2:
            layer = adapter_layer(key)
            shapes[f"{layer}.lora_down.weight"], shapes[f"{layer}.lora_up.weight"] = (rank, shape[1]), (shape[0], rank)
    return shapes


def adapter_layer(key: str) -> str:
    return "lora_unet_" + key.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")


def drawn(place: str, seed: int) -> Callable[[str, Shape], torch.Tensor]:
    """Values that leave activations at a size around one, so that float16 holds them."""
    generator = torch.Generator(device=place).manual_seed(seed)

    def make(key: str, shape: Shape) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, device=place)
        if len(shape) == 1:
            return 1 + 0.05 * noise if key.endswith(".weight") else 0.02 * noise
        # What an adapter adds to its layer is a tenth of what that gives.
        gain = 0.1 if key.endswith(".lora_up.weight") else 1.0
        return noise.mul_(gain / noise[0].numel() ** 0.5)

    return make


def made(path: Path, shapes: dict[str, Shape], place: str, seed: int) -> dict:
    """Writes the file unless it is there, and says what that took."""
    began, is_new = time.perf_counter(), not path.exists()
    if is_new:
        weight_file.write(path, shapes, drawn(place, seed))
    size, seconds = round(path.stat().st_size / 1e9, 3), round(time.perf_counter() - began, 2)
    return {"file": path.name, "GB": size, "seconds": seconds if is_new else "made before"}
