"""From noise to a latent: the noise levels of Stable Diffusion, guidance by a prompt, and two samplers.

Nothing here knows of a broker: a model is a function. Samplers work on latents to which noise of the size sigma was
added; a UNet gets them scaled to the variance that it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

TRAINED_STEPS = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012
# What is left of a picture where a model was trained to start from nothing but noise. Nothing at all would be a sigma
# without end.
LEAST_SIGNAL = 2.0**-24

# What a UNet gives for rows of latents, their timesteps, contexts, and vectors where it takes them.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One step of a sampler: where it stands, and how much noise is to be left after it."""

    timestep: int
    sigma: float
    next_sigma: float


def schedule(count: int, zero_terminal_snr: bool = False) -> list[Step]:
    """`count` steps, evenly spaced from pure noise on, which is where every model of the family can start."""
    if not 1 <= count <= TRAINED_STEPS:
        raise ValueError(f"{count} steps: between 1 and {TRAINED_STEPS} are possible")
    sigmas = _trained_sigmas(zero_terminal_snr)
    timesteps = [round(TRAINED_STEPS - at * TRAINED_STEPS / count) - 1 for at in range(count)]
    levels = [sigmas[timestep] for timestep in timesteps] + [0.0]
    return [Step(*step) for step in zip(timesteps, levels[:-1], levels[1:], strict=True)]


def _trained_sigmas(zero_terminal_snr: bool) -> list[float]:
    """Standard deviation of the noise per timestep, beside a picture of variance one."""
    betas = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TRAINED_STEPS, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)
    if zero_terminal_snr:
        root = signal.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        signal = (root**2).clamp(min=LEAST_SIGNAL)
    sigmas: list[float] = ((1 - signal) / signal).sqrt().tolist()
    return sigmas


def noisy(noise: torch.Tensor, steps: list[Step]) -> torch.Tensor:
    """What sampling starts from, for noise of variance one."""
    return noise * math.hypot(1.0, steps[0].sigma)


class Guided:
    """What a model takes for the picture under the noise, led away from one prompt and towards another.

    Both prompts go through the model in one call, as conds 0 and 1 of its rows. Contexts and vectors are the same in
    every step: the model gets them with the first, and `None` after that.
    """

    def __init__(self, model: Model, prediction: str, prompts: list[Prompt], guidance: float) -> None:
        if prediction not in ("eps", "v"):
            raise ValueError(f"a model that predicts {prediction!r}: only eps and v are sampled here")
        self._model, self._prediction, self._guidance = model, prediction, guidance
        # Without guidance the prompt alone is asked for.
        prompts = prompts if guidance != 1 else prompts[-1:]
        self._conds = list(range(len(prompts)))
        self._context: torch.Tensor | None = _joined([prompt.context for prompt in prompts])
        vectors = [prompt.vector for prompt in prompts if prompt.vector is not None]
        self._vectors: torch.Tensor | None = torch.cat(vectors) if vectors else None

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        scale = math.hypot(1.0, step.sigma)
        rows = (x / scale).repeat(len(self._conds), 1, 1, 1)
        timesteps = torch.full((len(rows),), float(step.timestep))
        output = self._model(rows, timesteps, self._context, y=self._vectors, conds=self._conds)
        self._context = self._vectors = None
        away, *towards = output.chunk(len(self._conds))
        led = away + self._guidance * (towards[0] - away) if towards else away
        if self._prediction == "v":
            return x / scale**2 - led * (step.sigma / scale)
        return x - led * step.sigma


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: a context [1, tokens, width], and a vector [1, width] where the model takes one."""

    context: torch.Tensor
    vector: torch.Tensor | None = None


def _joined(contexts: list[torch.Tensor]) -> torch.Tensor:
    """Contexts as rows of one tensor. A shorter one is repeated, which changes nothing: attention is an average."""
    tokens = math.lcm(*(context.shape[1] for context in contexts))
    return torch.cat([context.repeat(1, tokens // context.shape[1], 1) for context in contexts])


Denoise = Callable[[torch.Tensor, Step], torch.Tensor]


def euler(denoise: Denoise, x: torch.Tensor, steps: Iterable[Step]) -> torch.Tensor:
    for step in steps:
        denoised = denoise(x, step)
        x = denoised + (x - denoised) * (step.next_sigma / step.sigma)
    return x


def dpmpp_2m(denoise: Denoise, x: torch.Tensor, steps: Iterable[Step]) -> torch.Tensor:
    """DPM-Solver++ of second order, which takes the trend since the step before into account."""
    before: tuple[torch.Tensor, float] | None = None
    for step in steps:
        denoised = denoise(x, step)
        if step.next_sigma == 0:
            x = denoised
            continue
        length = math.log(step.sigma / step.next_sigma)
        ahead = denoised
        if before is not None:
            earlier, earlier_length = before
            ahead = denoised + (denoised - earlier) * (length / earlier_length / 2)
        x = x * (step.next_sigma / step.sigma) - ahead * math.expm1(-length)
        before = (denoised, length)
    return x


SAMPLERS = {"euler": euler, "dpmpp_2m": dpmpp_2m}
