"""New latents and the proof that the answer to each one arrived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from .sizes import Size

MARKS = 16
PATTERN_PERIOD = 251


class NotDelivered(AssertionError):
    """An answer that does not belong to the request it was given for."""


def pattern(elements: int) -> numpy.ndarray:
    """What a baseline server lays in its images before the first request."""
    return numpy.resize(numpy.arange(PATTERN_PERIOD, dtype=numpy.float32), elements)


def mark(image: numpy.ndarray, latent: numpy.ndarray) -> None:
    """The whole work of a do-nothing model: 16 elements that depend on the latent."""
    step = image.size // MARKS
    image[: step * MARKS : step] = latent[:MARKS]


class Latents:
    """Makes a new latent in private memory for each request, and remembers what its answer must hold."""

    def __init__(self, size: Size, wrap: Callable[[numpy.ndarray], Any] = lambda latent: latent) -> None:
        self._random = numpy.random.default_rng(size.image_bytes)
        self._base = self._random.standard_normal(size.latent_shape).astype(numpy.float16)
        self._size = size
        self._wrap = wrap
        self.expected = numpy.zeros(MARKS, numpy.float32)

    def new(self) -> Any:
        latent = self._base.copy()
        latent.reshape(-1)[:MARKS] = self._random.standard_normal(MARKS)
        self.expected = latent.reshape(-1)[:MARKS].astype(numpy.float32)
        return self._wrap(latent)

    def check(self, image: Any, expected: numpy.ndarray | None = None) -> None:
        expected = self.expected if expected is None else expected
        flat = numpy.asarray(image).reshape(-1)
        step = self._size.image_bytes // 4 // MARKS
        if not numpy.array_equal(flat[: step * MARKS : step], expected):
            raise NotDelivered(f"{self._size.name}: the marks of the image are not those of its latent")


def verify(call: Callable[[Any], Any], size: Size, latents: Latents, patterned: bool) -> dict:
    """Everything that can be expected of an image, compared once; two live images must not share memory."""
    first = call(latents.new())
    of_first = latents.expected
    array = numpy.asarray(first)
    if array.shape != size.image_shape or array.dtype != numpy.float32:
        raise NotDelivered(f"{size.name}: expected float32 {size.image_shape}, got {array.dtype} {array.shape}")
    latents.check(first, of_first)
    if patterned:
        whole = pattern(array.size)
        mark(whole, of_first)
        if not numpy.array_equal(array.reshape(-1), whole):
            raise NotDelivered(f"{size.name}: elements between the marks differ from the server's pattern")
    return {
        "image_bytes": array.nbytes,
        "latent_bytes": size.latent_bytes,
        "elements_compared": array.size if patterned else MARKS,
    }


def verify_two_live(call: Callable[[Any], Any], latents: Latents) -> None:
    """A held image must survive the next request."""
    first = call(latents.new())
    of_first = latents.expected
    second = call(latents.new())
    latents.check(second)
    latents.check(first, of_first)
