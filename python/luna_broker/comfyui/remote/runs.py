"""Sampling runs at the broker: opened with the first step that needs one, closed when sampling ends."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from luna_broker import LunaBrokerError, Stale

# Of one sampling: one for each set of patches that its conditionings have.
MOST_OPEN = 8
# Conditionings of one run. Each sampling brings new ones, so that more are those of runs that nobody ended.
MOST_CONDS = 64

Stack = tuple[tuple[str, float], ...]
BlockCache = tuple[tuple[str, Any], ...]


@dataclass
class Open:
    """A run, and what it was sent."""

    run: Any
    numbers: dict[Any, int] = field(default_factory=dict)
    """The run's number of each conditioning, by ComfyUI's uuid."""
    sent: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    """Context and vector of each, by number."""


class Runs:
    """The open runs of one UNet."""

    def __init__(self, unet: Any, check: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        """`unet`: a `luna_broker.Unet`. `check` is given what it took up of adapters, and raises if that is not all."""
        self._unet = unet
        self._check = check
        self._open: OrderedDict[tuple[Stack, BlockCache | None], Open] = OrderedDict()

    def step(
        self,
        stack: Stack,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None,
        control: Mapping[str, Sequence[torch.Tensor | None]] | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """One forward. `stack`: adapters with strengths. `options`: transformer_options, of which little is looked at.

        Raises `ModelNotFound` where the broker has an adapter no more.
        """
        uuids = options.get("uuids") or ()
        cache = _cache(options)
        if not uuids or x.shape[0] % len(uuids) or len(set(uuids)) != len(uuids):
            result = self._unet(x, timesteps, context, y=y, control=control, loras=stack)
            self._check(self._unet.last.step["adapters"])
            return result
        key = (stack, cache)
        for is_again in (False, True):
            found = self._find(key, uuids, options)
            try:
                return _run(found, uuids, x, timesteps, context, y, control)
            except Stale:
                # The broker ended it: one that begins now has everything sent anew.
                self._drop(key)
                if is_again:
                    raise
            except LunaBrokerError:
                self._drop(key)
                raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends all runs."""
        while self._open:
            self._drop(next(iter(self._open)))

    @property
    def open(self) -> int:
        """How many there are."""
        return len(self._open)

    def _find(self, key: tuple[Stack, BlockCache | None], uuids: Sequence[Any], options: Mapping[str, Any]) -> Open:
        found = self._open.get(key)
        if found is not None and len(found.numbers.keys() | set(uuids)) > MOST_CONDS:
            self._drop(key)
            found = None
        if found is None:
            stack, cache = key
            sigmas = None if cache is None else _sigmas(options)
            run = self._unet.run(loras=stack, fb_cache=None if cache is None else dict(cache), sigmas=sigmas)
            self._check(run.adapters)
            found = self._open[key] = Open(run)
        self._open.move_to_end(key)
        while len(self._open) > MOST_OPEN:
            self._drop(next(iter(self._open)))
        return found

    def _drop(self, key: tuple[Stack, BlockCache | None]) -> None:
        found = self._open.pop(key, None)
        if found is None:
            return
        # Where the broker is gone, so is the run.
        with contextlib.suppress(LunaBrokerError):
            found.run.close()


def _run(
    found: Open,
    uuids: Sequence[Any],
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None,
    control: Mapping[str, Sequence[torch.Tensor | None]] | None,
) -> torch.Tensor:
    conds = [found.numbers.setdefault(uuid, len(found.numbers)) for uuid in uuids]
    contexts = context.chunk(len(conds))
    vectors: Sequence[torch.Tensor | None] = (None,) * len(conds) if y is None else y.chunk(len(conds))
    given = dict(zip(conds, zip(contexts, vectors, strict=True), strict=True))
    if all(_same(found.sent.get(cond), pair) for cond, pair in given.items()):
        return found.run(x, timesteps, control=control, conds=conds)
    result = found.run(x, timesteps, context, y=y, control=control, conds=conds)
    # Copies: what a node does with its tensors later is not what was sent.
    for cond, (rows, vector) in given.items():
        found.sent[cond] = (rows.clone(), None if vector is None else vector.clone())
    return result


def _same(
    sent: tuple[torch.Tensor, torch.Tensor | None] | None, given: tuple[torch.Tensor, torch.Tensor | None]
) -> bool:
    # By content, as nodes change a conditioning from step to step without another uuid.
    return sent is not None and all(map(_equal, sent, given))


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _cache(options: Mapping[str, Any]) -> BlockCache | None:
    wanted = options.get("luna_broker", {}).get("fb_cache")
    return None if wanted is None else tuple(sorted(wanted.items()))


def _sigmas(options: Mapping[str, Any]) -> list[float] | None:
    """The noise levels of the sampling, where they fall as the broker's reckoning wants; else it goes by timesteps."""
    schedule = options.get("sample_sigmas")
    if schedule is None:
        return None
    sigmas = [float(sigma) for sigma in schedule.flatten().tolist()]
    falls = all(before > after for before, after in zip(sigmas, sigmas[1:], strict=False))
    return sigmas if len(sigmas) > 1 and falls and all(map(math.isfinite, sigmas)) else None
