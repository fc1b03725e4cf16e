"""A picture from a text by a broker's models: encode the prompts, sample a latent in one run, decode it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import luna_broker
import sampler
import torch
from sampler import Guided, Prompt, Step

# How large a latent is for the UNet, beside what the VAE makes of a picture.
LATENT_SCALE, LATENT_SCALE_XL = 0.18215, 0.13025
FAMILIES_XL = ("sdxl", "sdxl-refiner", "ssd-1b", "vega", "koala")

Watch = Callable[[int, int], object]


@dataclass(frozen=True)
class Order:
    """What to paint. Sides are in pixels."""

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    guidance: float = 7.0
    seed: int = 0
    sampler: str = "dpmpp_2m"
    loras: tuple[tuple[str, float], ...] = ()
    # How much the first block may change from one step to the next for the others to be skipped; none skips nothing.
    fb_cache: float | None = None


@dataclass(frozen=True)
class Picture:
    # float32 [height, width, 3] in 0…1
    pixels: torch.Tensor
    # Steps of which the broker left out most.
    hits: int
    # Seconds that sampling took, without text encoders and VAE.
    sampling_s: float


@final
class Painter:
    """The parts of one checkpoint."""

    def __init__(self, client: luna_broker.Client, checkpoint: str | Path) -> None:
        self._clip = client.clip(checkpoint)
        self._unet = client.unet(checkpoint)
        self._vae = client.vae(checkpoint)
        self._facts: dict[str, Any] = self._unet.info["unet"]
        if self._facts["variant"] != "plain":
            raise ValueError(f"{checkpoint} is for inpainting or instructions: it needs more than a text")

    def paint(self, order: Order, watch: Watch = lambda done, total: None) -> Picture:
        """Paints one picture. `watch` is told the steps that are done, and those in all."""
        ratio = int(self._vae.info["ratio"])
        width, height = max(1, order.width // ratio), max(1, order.height // ratio)
        generator = torch.Generator().manual_seed(order.seed)
        noise = torch.randn((1, int(self._vae.info["latent_channels"]), height, width), generator=generator)
        size = (width * ratio, height * ratio)
        prompts = [self.encode(text, *size, order.loras) for text in (order.negative, order.prompt)]
        started = time.perf_counter()
        latent, hits = self.sample(order, noise, prompts, watch)
        sampling_s = time.perf_counter() - started
        return Picture(self.decode(latent), hits, sampling_s)

    def encode(self, text: str, width: int, height: int, loras: Sequence[tuple[str, float]] = ()) -> Prompt:
        """What the UNet takes of a text, for a picture of that size."""
        context, pooled = self._clip.encode(text, loras=list(loras))
        if self._facts["vector_width"] is None:
            return Prompt(context)
        return Prompt(context, luna_broker.sdxl_vector(pooled, original=(height, width)))

    def sample(
        self, order: Order, noise: torch.Tensor, prompts: list[Prompt], watch: Watch = lambda done, total: None
    ) -> tuple[torch.Tensor, int]:
        """The latent for the UNet that comes of `noise`, and of how many steps most was left out."""
        steps = sampler.schedule(order.steps, self._facts["zero_terminal_snr"])
        cache = None if order.fb_cache is None else {"threshold": order.fb_cache}
        sigmas = [*(step.sigma for step in steps), 0.0]
        with self._unet.run(loras=list(order.loras), fb_cache=cache, sigmas=sigmas) as run:
            denoise = Guided(run, self._facts["prediction"], prompts, order.guidance)
            latent = sampler.SAMPLERS[order.sampler](denoise, sampler.noisy(noise, steps), _watched(steps, watch))
            return latent, int(run.report["hits"])

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The picture of a latent for the UNet, as pixels [height, width, 3]."""
        family = self._unet.info["family"]
        # Of sizes that are no family's, those with a vector are made like SDXL.
        is_xl = family in FAMILIES_XL or (family == "generic" and self._facts["vector_width"] is not None)
        image: torch.Tensor = self._vae.decode(latent / (LATENT_SCALE_XL if is_xl else LATENT_SCALE))
        return image[0]


def _watched(steps: list[Step], watch: Watch) -> Iterator[Step]:
    for done, step in enumerate(steps):
        watch(done, len(steps))
        yield step
    watch(len(steps), len(steps))
