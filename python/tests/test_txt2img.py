"""The example that paints pictures, against diffusers' pipelines on the same noise."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "txt2img"))

import arguments  # noqa: E402
import sampler  # noqa: E402
from painter import Order, Painter  # noqa: E402
from tune import table, tune  # noqa: E402

GOLDEN = Path(os.environ.get("LUNA_BROKER_GOLDEN", "")) / "pipeline"
# Of the largest number in a latent, after all steps. Steps in another order of sums, and noise levels in float64 where
# diffusers has float32, make 6e-6; noise that is 0.2 % too weak makes 2e-3.
TOLERANCE = 2e-5

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="LUNA_BROKER_GOLDEN names no folder made by tests/golden/make_pipeline.py"
)
SETTINGS: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text()) if GOLDEN.is_dir() else {"cases": []}
CASES = {f"{case['model']}-{case['case']}": case for case in SETTINGS["cases"]}


class Golden:
    """One case: what goes in, and what the pipeline made of it."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.facts = case
        self.checkpoint = GOLDEN / f"{case['model']}.safetensors"
        tensors = load_file(GOLDEN / f"{case['model']}.io.safetensors")
        self.noise = tensors["noise"]
        self.latent = tensors[f"{case['case']}.latent"]
        self.image = tensors.get(f"{case['case']}.image")
        size = [side * 8 for side in self.noise.shape[2:]]
        self.prompts = [
            sampler.Prompt(tensors[f"{which}.cond"], vector(tensors.get(f"{which}.pooled"), *size))
            for which in ("negative", "positive")
        ]

    def off(self, latent: torch.Tensor) -> float:
        assert latent.shape == self.latent.shape
        return float((latent - self.latent).abs().max() / self.latent.abs().max())


def vector(pooled: torch.Tensor | None, height: int, width: int) -> torch.Tensor | None:
    if pooled is None:
        return None
    frequencies = [10_000 ** (-at / 128) for at in range(128)]
    sizes = (height, width, 0, 0, height, width)
    waves = [wave(size * f) for size in sizes for wave in (math.cos, math.sin) for f in frequencies]
    return torch.cat([pooled, torch.tensor([waves])], 1)


class StepByStep:
    """A UNet of the broker as samplers call a model: what they give once is given with each step."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._kept: tuple[Any, Any] = (None, None)

    def __call__(self, x: Any, timesteps: Any, context: Any, y: Any = None, conds: Any = None) -> torch.Tensor:
        if context is not None:
            self._kept = (context, y)
        assert conds == [0, 1]
        context, y = self._kept
        output: torch.Tensor = self._unet(x, timesteps, context, y)
        return output


@needs_golden
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case["loras"]])
def test_samplers_give_what_diffusers_gives(client: Any, name: str) -> None:
    golden = Golden(CASES[name])
    steps = sampler.schedule(SETTINGS["steps"], golden.facts["zero_terminal_snr"])
    model = StepByStep(client.unet(golden.checkpoint))
    denoise = sampler.Guided(model, golden.facts["prediction"], golden.prompts, SETTINGS["guidance"])
    latent = sampler.SAMPLERS[golden.facts["sampler"]](denoise, sampler.noisy(golden.noise, steps), steps)
    assert golden.off(latent) <= TOLERANCE


def order(golden: Golden, **more: Any) -> Order:
    height, width = (side * 8 for side in golden.noise.shape[2:])
    loras = tuple(
        (str(GOLDEN / f"{golden.facts['model']}.{name}.safetensors"), strength)
        for name, strength in golden.facts["loras"]
    )
    return Order(
        prompt=SETTINGS["positive"],
        negative=SETTINGS["negative"],
        width=width,
        height=height,
        steps=SETTINGS["steps"],
        guidance=SETTINGS["guidance"],
        sampler=golden.facts["sampler"],
        loras=loras,
        **more,
    )


@needs_golden
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["prediction"] == "eps"])
def test_a_run_from_text_to_picture_is_the_pipelines(client: Any, name: str) -> None:
    golden = Golden(CASES[name])
    wanted = order(golden)
    painter = Painter(client, golden.checkpoint)
    prompts = [painter.encode(text, wanted.width, wanted.height) for text in (wanted.negative, wanted.prompt)]
    for found, expected in zip(prompts, golden.prompts, strict=True):
        assert torch.allclose(found.context, expected.context, rtol=0, atol=1e-5)
        if expected.vector is not None:
            assert torch.allclose(found.vector, expected.vector, rtol=0, atol=1e-4)
    latent, hits = painter.sample(wanted, golden.noise, prompts)
    assert golden.off(latent) <= TOLERANCE
    assert hits == 0
    if golden.image is not None:
        assert (painter.decode(latent) - golden.image[0]).abs().max() <= 1e-4


@needs_golden
def test_a_cache_is_tuned_from_nothing_to_everything(client: Any) -> None:
    golden = Golden(CASES["sd15-dpmpp_2m"])
    rows = tune(Painter(client, golden.checkpoint), order(golden), [0.0, 0.1, 1e9])
    exact, none, _, all_but_one = rows
    assert (exact.hit_rate, none.hit_rate, none.largest_difference) == (0, 0, 0)
    assert all_but_one.hit_rate == 1 - 1 / SETTINGS["steps"]
    assert all_but_one.psnr_db < 40
    assert len(table(rows).splitlines()) == 5


@needs_golden
def test_the_program_writes_a_picture_or_says_why_not(broker: Any, tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(REPOSITORY / "examples" / "txt2img" / "main.py"), "--socket", broker.address]
        told = ["--prompt", "a photo of a cat", "--size", "64x48", "--steps", "2", "--out", str(out)]
        return subprocess.run([*program, *told, *more], capture_output=True, text=True, timeout=100)

    out = tmp_path / "cat.png"
    adapter = f"{GOLDEN / 'sd15.attention.safetensors'}:0.5"
    done = run("--checkpoint", str(GOLDEN / "sd15.safetensors"), "--lora", adapter, "--fb-cache", "0.1")
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.size == (64, 48)
        assert np.asarray(image).std() > 1
    failed = run("--checkpoint", str(tmp_path / "nothing.safetensors"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("ModelNotFound: ")


def test_adapters_are_named_with_or_without_strength() -> None:
    assert arguments.lora("ink.safetensors:0.8") == ("ink.safetensors", 0.8)
    assert arguments.lora("ink.safetensors:-1") == ("ink.safetensors", -1.0)
    assert arguments.lora("ink.safetensors") == ("ink.safetensors", 1.0)
    assert arguments.lora("C:\\ink.safetensors") == ("C:\\ink.safetensors", 1.0)
    assert arguments.size("512") == (512, 512)
    assert arguments.size("640x384") == (640, 384)


def test_steps_go_evenly_from_noise_to_nothing() -> None:
    steps = sampler.schedule(4)
    assert [step.timestep for step in steps] == [999, 749, 499, 249]
    assert [step.next_sigma for step in steps] == [*(step.sigma for step in steps[1:]), 0.0]
    assert steps[0].sigma == pytest.approx(14.6146, abs=1e-4)
    assert sampler.schedule(1000)[-1].sigma == pytest.approx(0.02916, abs=1e-5)
    assert sampler.schedule(3, zero_terminal_snr=True)[0].sigma == pytest.approx(4096.0, abs=1e-3)
    for count in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            sampler.schedule(count)


@pytest.mark.parametrize("name", sorted(sampler.SAMPLERS))
def test_a_sampler_finds_what_does_not_depend_on_the_noise(name: str) -> None:
    picture = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    steps = sampler.schedule(7)
    found = sampler.SAMPLERS[name](lambda x, step: picture, sampler.noisy(torch.ones(1, 4, 3, 2), steps), steps)
    assert torch.equal(found, picture)


def test_prompts_of_unequal_length_are_one_call_and_cross_once() -> None:
    calls: list[tuple[Any, Any, Any]] = []

    def model(x: torch.Tensor, timesteps: torch.Tensor, context: Any, y: Any = None, conds: Any = None) -> torch.Tensor:
        calls.append((context, y, conds))
        return torch.cat([torch.full_like(x[:1], float(cond)) for cond in conds])

    prompts = [sampler.Prompt(torch.zeros(1, 154, 8)), sampler.Prompt(torch.ones(1, 77, 8))]
    step = sampler.schedule(1)[0]
    guided = sampler.Guided(model, "eps", prompts, 3.0)
    # What the prompts give is 0 and 1, which guidance makes 3.
    assert torch.equal(guided(torch.zeros(1, 4, 2, 2), step), torch.full((1, 4, 2, 2), -3 * step.sigma))
    guided(torch.zeros(1, 4, 2, 2), step)
    (context, _, conds), (later, _, _) = calls
    assert context.shape == (2, 154, 8)
    assert context[1].min() == 1
    assert (conds, later) == ([0, 1], None)

    calls.clear()
    sampler.Guided(model, "eps", prompts, 1.0)(torch.zeros(1, 4, 2, 2), step)
    assert [(tuple(context.shape), conds) for context, _, conds in calls] == [((1, 77, 8), [0])]


def test_what_cannot_be_sampled_is_said() -> None:
    with pytest.raises(ValueError, match="edm"):
        sampler.Guided(lambda: None, "edm", [], 1.0)
