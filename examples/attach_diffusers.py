"""A UNet of diffusers on weights that lie in the broker's memory once, however many workers there are.

python examples/attach_diffusers.py --socket /tmp/luna.sock --unet folder/of/a/unet
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import luna_broker
import torch
from diffusers import UNet2DConditionModel
from luna_broker.torch import load_attached, skeleton
from private_broker import broker_at
from safetensors.torch import load_file

TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", help="the broker's socket; without it one is started")
    parser.add_argument("--unet", help="a folder as diffusers writes it; without it a small UNet is made up")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luna-") as scratch, broker_at(arguments.socket, scratch) as address:
        folder = Path(arguments.unet) if arguments.unet else _made_up(Path(scratch) / "unet")
        with luna_broker.connect(address) as client:
            step(client, folder)


def step(client: luna_broker.Client, folder: Path) -> None:
    config = UNet2DConditionModel.load_config(folder)
    with skeleton():
        unet = UNet2DConditionModel.from_config(config).eval()
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_attached(unet, path, client=client, dtype=torch.float32)

    side, tokens = unet.config.sample_size, unet.config.cross_attention_dim
    latent, context = torch.randn(1, unet.config.in_channels, side, side), torch.randn(1, 7, tokens)
    with torch.inference_mode():
        noise = unet(latent, 500, context).sample

    assert noise.shape == latent.shape, noise.shape
    # Not `from_pretrained`: it computes where the file is mapped, and rounds otherwise there, as nothing is aligned.
    own = UNet2DConditionModel.from_config(config).eval()
    own.load_state_dict(load_file(path))
    with torch.inference_mode():
        assert torch.equal(noise, own(latent, 500, context).sample)
    print(f"{weights!r}: the same noise, bit for bit, as with weights of its own")


def _made_up(folder: Path) -> Path:
    UNet2DConditionModel(**TINY).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
