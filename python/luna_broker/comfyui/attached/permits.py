"""A VAE that computes in this process, and waits for its turn in the broker's lane before it does."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.sd
import luna_broker
from luna_broker import Busy, Client, ConnectionLost, ShuttingDown, Stale, Timeout
from torch import Tensor

_LOG = logging.getLogger("luna_broker")

# ComfyUI reckons with 2178 elements for each pixel of a picture, the broker with 768 and half as much again, of the
# layer that has most. What is asked for is the broker's, so that both cut a picture into tiles at the same size.
RECKONED_SHARE = 768 * 1.5 / 2178

# ComfyUI's tiles where memory is short: columns and rows, of a latent and of a picture.
LATENT_TILE = 64
PICTURE_TILE = 512


class AttachedVAE(comfy.sd.VAE):
    """ComfyUI's VAE. Of all workers and the broker, one at a time encodes or decodes.

    What does not fit the broker's budget is done in tiles, as ComfyUI does where memory is short.
    """

    luna_client: Client | None
    """Who gives permits, if anybody does."""

    def decode(self, samples_in: Tensor, *arguments: Any, **options: Any) -> Tensor:
        count = self._bytes(self.memory_used_decode, samples_in.shape)
        try:
            with self._turn(count):
                return super().decode(samples_in, *arguments, **options)
        except _refused():
            if not _is_tiled(samples_in):
                raise
        _LOG.warning("luna-broker: decoding in tiles, as %d bytes are more than the broker's VAE budget", count)
        return self.decode_tiled(samples_in)

    def encode(self, pixel_samples: Tensor, *arguments: Any, **options: Any) -> Tensor:
        count = self._bytes(self.memory_used_encode, _nchw(pixel_samples.shape))
        try:
            with self._turn(count):
                return super().encode(pixel_samples, *arguments, **options)
        except _refused():
            if not _is_tiled(pixel_samples):
                raise
        _LOG.warning("luna-broker: encoding in tiles, as %d bytes are more than the broker's VAE budget", count)
        return self.encode_tiled(pixel_samples)

    def decode_tiled(self, samples: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tile = _tile(samples.shape, LATENT_TILE, arguments, options)
        with self._turn(self._bytes(self.memory_used_decode, tile)):
            return super().decode_tiled(samples, *arguments, **options)

    def encode_tiled(self, pixel_samples: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tile = _tile(_nchw(pixel_samples.shape), PICTURE_TILE, arguments, options)
        with self._turn(self._bytes(self.memory_used_encode, tile)):
            return super().encode_tiled(pixel_samples, *arguments, **options)

    def _bytes(self, reckon: Callable[[Any, Any], float], shape: tuple[int, ...]) -> int:
        """Working memory of a call on one sample: what is in a batch is done one by one where it does not fit."""
        return int(reckon((1, *shape[1:]), self.vae_dtype) * RECKONED_SHARE)

    @contextlib.contextmanager
    def _turn(self, count: int) -> Iterator[None]:
        """A permit of the broker's; none where there is no broker, or its lane is full: weights of its own, which this
        worker would load instead, would take more than others working at the same time do."""
        with contextlib.ExitStack() as turn:
            if self.luna_client is not None:
                try:
                    turn.enter_context(self.luna_client.permit("vae", bytes=count))
                except (Busy, ConnectionLost, ShuttingDown, Stale, Timeout) as error:
                    _LOG.warning("luna-broker: the VAE works without a permit: %s", error)
            yield
            # What this call worked in is the next one's, which may be another worker's.
            if self.device.type == "cpu":
                _trim()


def _trim() -> None:
    """Gives the system what this process has allocated and freed again, where the C library keeps it for itself."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        # Not glibc.
        return None


def _refused() -> type[BaseException]:
    """What a permit for too many bytes raises; it is a torch.OutOfMemoryError too, and made when torch is loaded."""
    return luna_broker.OutOfMemory


def _is_tiled(samples: Tensor) -> bool:
    """Whether ComfyUI's tiles for pictures fit: a batch of latents or pictures, and not of films."""
    return samples.ndim == 4


def _nchw(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


def _tile(shape: tuple[int, ...], usual: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a tile: all three passes over a picture have tiles of the same area."""
    given = dict(zip(("tile_x", "tile_y"), arguments, strict=False)) | options
    rows, columns = given.get("tile_y") or usual, given.get("tile_x") or usual
    return (*shape[:-2], min(shape[-2], rows), min(shape[-1], columns))
