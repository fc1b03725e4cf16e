"""The example that paints pictures, against diffusers' pipelines on the same noise."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "txt2img"))

import sampler  # noqa: E402

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
