"""The UNet that the broker's is held against, and files of random weights."""

from __future__ import annotations

import math
import os
from pathlib import Path

import luna_broker
import pytest
import sdxl_checkpoint
import torch
import weight_file
from programs import Broker
from safetensors.torch import load_file
from sdxl_scene import Scene, distance
from sdxl_unet import FULL, PREFIX, Sizes, filled

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_a_file_is_what_the_library_reads(tmp_path: Path):
    shapes = {"a.weight": (3, 5), "b.bias": (7,), "c": ()}
    weight_file.write(tmp_path / "file", shapes, lambda _, shape: torch.randn(shape))
    ours, theirs = weight_file.read(tmp_path / "file", "cpu"), load_file(tmp_path / "file")
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == shapes
    assert all(torch.equal(ours[key], theirs[key]) for key in shapes) and len(ours) == len(theirs)


@pytest.mark.parametrize(
    ("widths", "depths", "blocks", "height", "width"), [((1, 2), (0, 1), 1, 8, 8), ((1, 2, 4), (0, 1, 2), 2, 9, 13)]
)
@pytest.mark.usefixtures("no_gradients")
def test_the_reference_computes_what_diffusers_computes(widths, depths, blocks, height, width, monkeypatch):
    monkeypatch.syspath_prepend(GOLDEN)
    import make_unet

    model = make_unet.late(4, depths, tuple(64 * factor for factor in widths), layers=blocks)
    case = make_unet.Case(model, 41, 2, height, width, [981.0, 13.37])
    sizes = Sizes(64, widths, depths, context=48, vector=24 + 6 * 8, blocks=blocks)
    unet = filled(sizes, {PREFIX + key: tensor for key, tensor in make_unet.single_file(model).items()})
    x, timesteps, context, y = (case.tensors[name] for name in ("x", "timesteps", "context", "y"))
    assert distance(unet(x, timesteps, context, y), case.answer()) < 1e-6


def test_the_broker_takes_the_full_size_for_sdxl(tmp_path: Path, broker: str):
    shapes = {
        "unet": sdxl_checkpoint.unet_shapes(FULL),
        "text": sdxl_checkpoint.text_shapes(FULL),
        "vae": sdxl_checkpoint.vae_shapes(FULL),
    }
    for name, tensors in shapes.items():
        words, size = weight_file.head(tensors)
        (tmp_path / name).with_suffix(".safetensors").write_bytes(words)
        # What the tensors contain takes no space, and nobody reads it.
        os.truncate((tmp_path / name).with_suffix(".safetensors"), len(words) + size)
    assert sum(math.prod(shape) for shape in shapes["unet"].values()) == 2_567_463_684
    with Broker(broker, tmp_path) as serving, luna_broker.connect(serving.socket, timeout=20) as client:
        found = client.unet(tmp_path / "unet.safetensors").info
        assert (found["family"], found["unet"]["prediction"], found["unet"]["vector_width"]) == ("sdxl", "eps", 2816)
        text = client.clip(tmp_path / "text.safetensors").info["clip"]["encoders"]
        widths = [(one["kind"], one["width"], one["layers"], one["projection"]) for one in text]
        assert widths == [("clip_l", 768, 12, None), ("clip_g", 1280, 32, 1280)]
        vae = client.vae(str(tmp_path / "vae.safetensors")).info
        assert (vae["family"], vae["ratio"], vae["latent_channels"]) == ("autoencoder-kl", 8, 4)


def test_activations_stay_far_from_where_float16_ends(scene: Scene):
    seen: list[float] = []
    unet = scene.own_unet()
    for module in unet.modules():
        module.register_forward_hook(lambda _module, _given, out: seen.append(out.abs().max().item()))
    out = unet(*scene.given())
    assert 0.1 < out.std() < 10 and 1 < max(seen) < 1000
