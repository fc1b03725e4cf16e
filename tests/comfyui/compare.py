"""How near two results must be."""

from __future__ import annotations

import numpy as np
from result import Result

IMAGE_TOLERANCE = 1 / 255
# Of the largest element, or absolute where all are below 1: latents cross nodes unscaled, so that theirs are about 5.
LATENT_TOLERANCE = 1e-4


def assert_equal(result: Result, reference: Result) -> None:
    """Bit for bit."""
    for name in _kept(result, reference):
        got, expected = result.tensor(name), reference.tensor(name)
        assert got.shape == expected.shape, f"{name}: {got.shape} instead of {expected.shape}"
        wrong = int(np.count_nonzero(got.view(np.uint32) != expected.view(np.uint32)))
        assert wrong == 0, f"{name}: {wrong} of {got.size} elements differ, by up to {np.abs(got - expected).max():.2e}"


def assert_near(result: Result, reference: Result) -> None:
    """Images within one step of eight bits, everything else within `LATENT_TOLERANCE`."""
    for name in _kept(result, reference):
        got, expected = result.tensor(name), reference.tensor(name)
        assert got.shape == expected.shape, f"{name}: {got.shape} instead of {expected.shape}"
        limit = IMAGE_TOLERANCE if name == "image" else LATENT_TOLERANCE * max(1.0, float(np.abs(expected).max()))
        off = difference(got, expected)
        assert off <= limit, f"{name}: differs by up to {off:.2e}, allowed is {limit:.2e}"


def assert_different(result: Result, other: Result, name: str = "latent") -> None:
    """By far more than what counts as near: whatever sets the two apart did something."""
    off = difference(result.tensor(name), other.tensor(name))
    assert off > 100 * LATENT_TOLERANCE, f"{name}: differs by {off:.2e} only, which shows nothing"


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two elements; infinite where one result is no number."""
    if not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(got - expected).max())


def _kept(result: Result, reference: Result) -> set[str]:
    names = reference.names()
    assert names, "the reference kept nothing"
    assert result.names() == names, f"kept were {result.names()} instead of {names}"
    return names
