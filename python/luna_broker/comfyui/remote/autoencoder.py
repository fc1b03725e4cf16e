"""ComfyUI's VAE around one of the broker's: each call is one request, in tiles where the broker finds that it must."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import luna_broker
import torch
from luna_broker import Client, Unsupported
from luna_broker.comfyui.files import Source
from luna_broker.comfyui.remote import refusals
from luna_broker.comfyui.remote.model import LOCALLY
from luna_broker.comfyui.remote.patcher import SIZE
from luna_broker.errors import refusal

_LOG = logging.getLogger("luna_broker")

# Sides of tiles and overlap where a node names none: of latents, and of pictures.
DECODING = (64, 64, 16)
ENCODING = (512, 512, 64)


class RemoteAutoencoder(torch.nn.Module):
    """What nodes find in the place of the network. It computes what ComfyUI's would: signed pixels, one latent each."""

    def __init__(self, vae: Any) -> None:
        """`vae`: a `luna_broker.Vae`."""
        super().__init__()
        self.vae = vae

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of pictures [N, 3, H, W] in -1..1."""
        return self.vae.encode((pixels.movedim(1, -1) + 1.0) / 2.0)

    def decode(self, latents: torch.Tensor, **ignored: Any) -> torch.Tensor:
        """Pictures [N, 3, H, W] in -1..1, where what lies beyond is cut off already."""
        return self.vae.decode(latents).movedim(-1, 1) * 2.0 - 1.0

    def state_dict(self, *args: Any, **options: Any) -> Any:
        raise refusals.reading("The VAE's weights")


class RemoteVAE(comfy.sd.VAE):
    """A VAE whose calls the broker runs."""

    def __init__(self, vae: Any) -> None:
        """`vae`: a `luna_broker.Vae`."""
        with _without_warning():
            super().__init__(sd={})
        info = vae.info
        self.luna_vae = vae
        self.latent_channels = info["latent_channels"]
        self.downscale_ratio = self.upscale_ratio = info["ratio"]
        self.device = mm.vae_device()
        self.output_device = mm.intermediate_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = RemoteAutoencoder(vae).eval()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device(), size=SIZE
        )

    def decode(self, samples_in: torch.Tensor, vae_options: Any = None) -> torch.Tensor:
        whole = _in_own_words(lambda: self.luna_vae.decode(samples_in, device=self.output_device), "decoding")
        return self.decode_tiled(samples_in) if whole is None else whole

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        pixels = _colours(pixel_samples)
        whole = _in_own_words(lambda: self.luna_vae.encode(pixels, device=self.output_device), "encoding")
        return self.encode_tiled(pixel_samples) if whole is None else whole

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        tiles = _tiles((tile_x, tile_y, overlap), DECODING)
        with _as_comfyui_has_it():
            return self.luna_vae.decode_tiled(samples, *tiles, device=self.output_device)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        tiles = _tiles((tile_x, tile_y, overlap), ENCODING)
        with _as_comfyui_has_it():
            return self.luna_vae.encode_tiled(_colours(pixel_samples), *tiles, device=self.output_device)


def load(client: Client, source: Source) -> RemoteVAE:
    """The VAE of a file. Raises `Unsupported` for one that is not for pictures."""
    vae = source.ask(client.vae)
    if not vae.info["ratio"]:
        raise refusal(Unsupported, f"{source.name} is no VAE for pictures; nothing was loaded", LOCALLY)
    return RemoteVAE(vae)


def _colours(pixels: torch.Tensor) -> torch.Tensor:
    # Strides as they are: what the network computes depends on them in the last bits.
    return pixels[..., :3]


def _tiles(given: tuple[int | None, ...], defaults: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(default if own is None else own for own, default in zip(given, defaults, strict=True))


def _in_own_words(call: Callable[[], torch.Tensor], what: str) -> torch.Tensor | None:
    """The result; `None` where memory did not do for it in one piece."""
    try:
        return call()
    except luna_broker.OutOfMemory as error:
        _LOG.warning("luna-broker: %s in one piece ran out of memory, it is done in tiles: %s", what, error)
        return None


@contextlib.contextmanager
def _as_comfyui_has_it() -> Iterator[None]:
    """Raises what ComfyUI expects of a device without memory, which nodes catch."""
    try:
        yield
    except luna_broker.OutOfMemory as error:
        if isinstance(error, mm.OOM_EXCEPTION):
            raise
        raise mm.OOM_EXCEPTION(str(error)) from error


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Without ComfyUI's warning that a VAE has no weights, which are where they belong."""
    logger = logging.getLogger()

    def quiet(record: logging.LogRecord) -> bool:
        return "No VAE weights" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
