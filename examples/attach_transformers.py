"""A text encoder of transformers on weights that lie in the broker's memory once, however many workers there are.

python examples/attach_transformers.py --socket /tmp/luna.sock --encoder folder/of/a/text_encoder
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import luna_broker
import torch
from luna_broker.torch import load_attached, skeleton
from private_broker import broker_at
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 998,
    "eos_token_id": 999,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", help="the broker's socket; without it one is started")
    parser.add_argument("--encoder", help="a folder as transformers writes it; without it a small encoder is made up")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luna-") as scratch, broker_at(arguments.socket, scratch) as address:
        folder = Path(arguments.encoder) if arguments.encoder else _made_up(Path(scratch) / "encoder")
        with luna_broker.connect(address) as client:
            encode(client, folder)


def encode(client: luna_broker.Client, folder: Path) -> None:
    config = CLIPTextConfig.from_pretrained(folder)
    # Its positions are a buffer that is computed and in no file: a skeleton has it.
    with skeleton():
        encoder = CLIPTextModel(config).eval()
    path = folder / "model.safetensors"
    weights = load_attached(encoder, path, client=client, dtype=torch.float32)

    tokens = torch.arange(1, 9)[None] % config.vocab_size
    with torch.inference_mode():
        encoded = encoder(tokens).last_hidden_state

    assert encoded.shape == (1, tokens.shape[1], config.hidden_size), encoded.shape
    own = CLIPTextModel(config).eval()
    own.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    with torch.inference_mode():
        assert torch.equal(encoded, own(tokens).last_hidden_state)
    print(f"{weights!r}: the same encoding, bit for bit, as with weights of its own")


def _made_up(folder: Path) -> Path:
    CLIPTextModel(CLIPTextConfig(**TINY)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
