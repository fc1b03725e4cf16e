"""Remote models beside ComfyUI's own in one process: what no workflow reaches, and each part by itself.

ComfyUI runs with the attention that the broker has, and with text encoders in single precision: without, it rounds
those that a LoRA was merged into, and sums in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "in_process" / "cases.py"
CASES = ("samplers", "adapters", "text", "vaes", "hooks", "controlled", "around", "inpainting", "xl")
IMAGE_TOLERANCE = 1 / 255
TOLERANCE = 1e-4
# Of latents whose elements are larger than this: random networks give large ones, and larger still by guidance.
USUAL_SIZE = 4.0
# What a case does by itself must be seen, or it shows nothing.
APART = 0.01
DEADLINE_S = 1200
WAYS_OUT = ("attached", "local")


@pytest.fixture(scope="module")
def results(checkout: Path, models: Path, broker: Any) -> dict[str, Any]:
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(PROGRAM)]
    command += ["--comfyui", str(checkout), "--broker", str(broker.address), "--models", str(models)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[3] / "python"), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert lines, f"nothing was computed:\n{done.stderr[-3000:]}"
    return {line["case"]: line for line in lines}


def result(results: dict[str, Any], name: str) -> dict[str, Any]:
    found = results[name]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_stock_loaders(results: dict[str, Any], name: str) -> None:
    found = result(results, name)
    far = {}
    for key, off in found["off"].items():
        size = 1.0 if key.startswith("image") else found["size"][key]
        limit = IMAGE_TOLERANCE if key.startswith("image") else TOLERANCE * max(1.0, size / USUAL_SIZE)
        if off > limit:
            far[key] = f"{off:.2e} of {limit:.2e}"
    assert not far, f"{name}: {far}"


@pytest.mark.parametrize("name", ["adapters", "around"])
def test_what_is_compared_differs_from_what_it_is_without(results: dict[str, Any], name: str) -> None:
    apart = result(results, name)["apart"]
    assert apart and min(apart.values()) > APART, apart


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        ("freeu", "output_block_patch"),
        ("pag", "attn1"),
        ("hypertile", "attn1_patch"),
        ("object", "diffusion_model"),
        ("override", "optimized_attention_override"),
        ("save_model", "UNet's weights"),
        ("save_clip", "text encoders' weights"),
        ("save_vae", "VAE's weights"),
        ("control_lora", "Control-LoRA"),
    ],
)
def test_what_cannot_be_remote_is_refused_by_name(results: dict[str, Any], patch: str, named: str) -> None:
    said = result(results, "refusals")["said"][patch]
    assert named in said and any(way in said for way in WAYS_OUT), said


def test_a_model_works_after_a_refusal(results: dict[str, Any]) -> None:
    assert result(results, "refusals")["said"]["after"] == 0.0


def test_little_crosses_and_none_of_it_twice(results: dict[str, Any]) -> None:
    said = result(results, "economy")["said"]
    assert (said["runs"], said["contexts"], said["steps"]) == (1, 1, 6)
    assert said["left_open"] == 0, "a run stays open behind sampling"
    assert said["cache"] == {"threshold": 0.5, "start": 0.1, "end": 0.9, "max_hits": 3}
    assert said["sigmas"] == said["steps"] + 1
    assert said["by_name"] == ["lora.safetensors"]
    assert said["by_upload"] == [["comfyui-patches", strength] for strength in (0.8, 0.4, 0.8)]
    assert said["uploads"] == 2, "one for the UNet and one for the text encoder"


def test_a_broker_that_was_restarted_is_sent_the_patches_again(results: dict[str, Any]) -> None:
    said = result(results, "restart")["said"]
    assert said == {"without": "ConnectionLost", "after": 0.0}
