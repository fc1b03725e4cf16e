"""ComfyUI within this process, and the models of the tests, its own and remote ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--comfyui", required=True)
PARSER.add_argument("--broker", required=True)
PARSER.add_argument("--models", required=True, type=Path)
PARSER.add_argument("cases", nargs="*")
ARGUMENTS = PARSER.parse_args()

sys.path.insert(0, ARGUMENTS.comfyui)
# In half precision, ComfyUI rounds text encoders that LoRAs were merged into; the broker does not.
sys.argv = ["main.py", "--cpu", "--fp32-text-enc", "--use-pytorch-cross-attention"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import luna_broker  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from luna_broker.comfyui import remote  # noqa: E402
from luna_broker.comfyui.files import Source  # noqa: E402

MODELS = ARGUMENTS.models
for kind in ("loras", "embeddings", "controlnet"):
    folder_paths.add_model_folder_path(kind, str(MODELS / kind), is_default=True)

CLIENT = luna_broker.connect(ARGUMENTS.broker, name="in-process")
Models = tuple[Any, Any, Any]
Results = dict[str, torch.Tensor]
CASES: dict[str, Callable[..., Any]] = {}
_LOADED: dict[tuple[str, bool], Models] = {}


def source(path: str) -> Source:
    return Source(Path(path).name, str(MODELS / path))


def models(name: str, is_remote: bool) -> Models:
    if (name, is_remote) not in _LOADED:
        path = str(MODELS / "checkpoints" / name)
        made = remote.checkpoint(CLIENT, source(f"checkpoints/{name}")) if is_remote else stock(path)
        _LOADED[name, is_remote] = made
    return _LOADED[name, is_remote]


def stock(path: str) -> Models:
    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings)[:3]


def encode(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model: Any, positive: Any, negative: Any, latent: Any = None, sampler: str = "euler", **more: Any) -> Any:
    settings = {"seed": 7, "steps": 4, "cfg": 4.0, "denoise": 1.0, "scheduler": "normal", **more}
    seed, steps, cfg, scheduler = (settings.pop(key) for key in ("seed", "steps", "cfg", "scheduler"))
    latent = {"samples": torch.zeros(1, 4, 8, 16)} if latent is None else latent
    with torch.inference_mode():
        (out,) = nodes.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, **settings
        )
    return out["samples"]


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    CASES[function.__name__] = function
    return function


def painted(model: Any, clip: Any, **more: Any) -> torch.Tensor:
    return sample(model, encode(clip, "a (red:1.3) house"), encode(clip, "blurry, text"), **more)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"{tuple(got.shape)} instead of {tuple(expected.shape)}")
    if got.dtype != expected.dtype or not torch.isfinite(got).all():
        raise ValueError(f"{got.dtype} instead of {expected.dtype}, or not finite")
    return float((got - expected).abs().max())
