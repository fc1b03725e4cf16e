"""The models that the tests run: small, of random weights, and recognised by ComfyUI as what they stand for.

Made once and kept beside the other things that are built. The text encoders have one size each in ComfyUI, which is
why those for SDXL are large.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import denoiser

Rows = list[tuple[str, tuple[int, ...], str]]

# Kinds of adapters, one file for each.
KINDS = ("lora", "locon", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "bias")

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "cond_stage_model.transformer.text_model."
EMBEDDING_WIDTH = 768

# Two levels, of which the lower one has the 640 channels that FreeU looks for.
WIDE = {"mc": 320, "mult": (1, 2), "res": 1, "depth_in": (1, 1), "depth_mid": 1, "depth_out": (1, 1, 1, 1)}
SMALL = {"mc": 320, "mult": (1,), "res": 1, "depth_in": (1,), "depth_mid": 1, "depth_out": (1, 1)}
SDXL = {"mc": 320, "mult": (1, 1, 1), "res": 1, "depth_in": (0, 2, 5), "depth_mid": 0, "depth_out": (1, 0, 1, 0, 0, 0)}
REFINER = {
    "mc": 384,
    "mult": (1, 1, 1, 1),
    "res": 2,
    "depth_in": (0, 0, 4, 4, 4, 4, 0, 0),
    "depth_mid": 1,
    "depth_out": (0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0),
}
SD15_TEXT = {"ctx": 768, "linear": False}


def make(folder: Path, tools: Path) -> None:
    """Fills `folder`, laid out as ComfyUI's folder of models, unless the same has been made before.

    `tools`: where `tinyckpt.py` and `make_lora.py` are.
    """
    recipe = hashlib.sha256()
    for source in (Path(__file__), Path(denoiser.__file__), tools / "tinyckpt.py", tools / "make_lora.py"):
        recipe.update(source.read_bytes())
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        # Two test runs must not make them at a time. Ends with the file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_unless_made(folder, tools, recipe.hexdigest())


def _make_unless_made(folder: Path, tools: Path, recipe: str) -> None:
    stamp = folder / "recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae", "controlnet", "embeddings", "loras"):
        (folder / name).mkdir(parents=True)
    sys.path.insert(0, str(tools))
    import tinyckpt

    for file, rows, seed in _files(tinyckpt):
        tinyckpt.write_safetensors(str(folder / file), rows, "f16", seed)
        if any(key.startswith(UNET) for key, _, _ in rows):
            denoiser.teach(folder / file, UNET)
    for kind in KINDS:
        _adapter(tools, folder / "checkpoints/small.safetensors", folder / f"loras/{kind}.safetensors", (kind,), 3)
    _adapter(tools, folder / "checkpoints/small.safetensors", folder / "loras/second.safetensors", ("lora",), 4)
    stamp.write_text(recipe)


def _files(t: Any) -> Sequence[tuple[str, Rows, int]]:
    """Path, tensors and seed of every file but the adapters."""
    small = t.unet(UNET, **SMALL, **SD15_TEXT)
    text = t.clip_hf(CLIP_L)
    sdxl = t.unet(UNET, **SDXL, ctx=2048, linear=True, adm=2816) + _taesd(t)
    sdxl += t.clip_hf("conditioner.embedders.0.transformer.text_model.")
    sdxl += t.clip_openclip("conditioner.embedders.1.model.")
    refiner = t.unet(UNET, **REFINER, ctx=1280, linear=True, adm=2560) + _taesd(t)
    refiner += t.clip_openclip("conditioner.embedders.0.model.")
    return [
        ("checkpoints/small.safetensors", small + _taesd(t) + text, 15),
        ("checkpoints/other.safetensors", small + _taesd(t) + text, 16),
        ("checkpoints/wide.safetensors", t.unet(UNET, **WIDE, **SD15_TEXT) + t.vae_kl(VAE) + text, 17),
        ("checkpoints/sdxl.safetensors", sdxl, 18),
        ("checkpoints/refiner.safetensors", refiner, 19),
        ("diffusion_models/bare.safetensors", small, 20),
        ("diffusion_models/inpaint.safetensors", t.unet(UNET, **SMALL, **SD15_TEXT, in_ch=9), 21),
        ("text_encoders/clip_l.safetensors", t.clip_hf("text_model."), 22),
        ("vae/kl.safetensors", t.vae_kl(""), 23),
        ("controlnet/small.safetensors", _controlnet(t), 24),
        ("embeddings/tiny.safetensors", [("emb_params", (3, EMBEDDING_WIDTH), "emb")], 25),
    ]


def _taesd(t: Any) -> Rows:
    """A small VAE whose pictures are grey around the middle: most of them would be black otherwise."""
    last = {f"{VAE}taesd_decoder.19.weight": "w:0.8", f"{VAE}taesd_decoder.19.bias": "const:0.5"}
    return [(key, shape, last.get(key, kind)) for key, shape, kind in t.vae_taesd(VAE)]


def _controlnet(t: Any) -> Rows:
    """A ControlNet for the small UNet: its first half, a projection for each of its outputs, and the way in."""
    halves = t.unet("", **SMALL, **SD15_TEXT)
    rows = [row for row in halves if not row[0].startswith(("output_blocks", "out."))]
    channels = SMALL["mc"]
    for block in range(2):
        rows += t.conv(f"zero_convs.{block}.0", channels, channels, 1, gain=0.3)
    rows += t.conv("middle_block_out.0", channels, channels, 1, gain=0.3)
    widths = (3, 16, 16, 32, 32, 96, 96, 256, channels)
    for layer, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        rows += t.conv(f"input_hint_block.{2 * layer}", after, before)
    return rows


def _adapter(tools: Path, checkpoint: Path, out: Path, kinds: Sequence[str], seed: int) -> None:
    command = [sys.executable, str(tools / "make_lora.py"), str(checkpoint), str(out), "--types", ",".join(kinds)]
    subprocess.run([*command, "--seed", str(seed), "--gain", "0.15"], check=True, stdout=subprocess.DEVNULL)
