"""The least that is useful: decode a latent in the broker.

python examples/decode.py --socket /tmp/luna.sock --vae model.safetensors
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import luna_broker
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", help="the broker's socket; without it the default one")
    parser.add_argument("--vae", help="a VAE checkpoint; without it one is constructed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luna-") as scratch:
        path = Path(arguments.vae).resolve() if arguments.vae else _constructed(Path(scratch))
        with luna_broker.connect(arguments.socket) as client:
            decode_one(client, path)


def decode_one(client: luna_broker.Client, path: Path) -> None:
    vae = client.vae(str(path))
    channels, ratio = vae.info["latent_channels"], vae.info["ratio"]
    latent = torch.randn(1, channels, 32, 48)

    image = vae.decode(latent)

    assert image.shape == (1, 32 * ratio, 48 * ratio, 3), image.shape
    assert image.dtype == torch.float32
    assert 0.0 <= image.min() <= image.max() <= 1.0
    print(f"{path.name}: latent {list(latent.shape)} -> image {list(image.shape)}")


def _constructed(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).with_name("demo")))
    from constructed import write_checkpoint

    return write_checkpoint(folder / "constructed.safetensors")


if __name__ == "__main__":
    main()
