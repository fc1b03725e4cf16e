"""Timed loops. Nothing but the call itself lies between the two clock readings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from .proof import Latents

# A peer that moves 100 MB by value answers a few times per second; fewer samples than this have no median.
LEAST_SAMPLES = 5


def summary(durations_ns: list[int]) -> dict:
    ordered = sorted(durations_ns)
    count = len(ordered)
    return {
        "p50_us": ordered[count // 2] / 1e3,
        "p99_us": ordered[min(count - 1, int(count * 0.99))] / 1e3,
        "samples": count,
    }


def hand_off(call: Callable[[Any], Any], latents: Latents, iterations: int, warm_up: int, seconds: float) -> dict:
    """Up to `iterations` requests within about `seconds`, after `warm_up` untimed ones."""
    clock = time.perf_counter_ns
    durations: list[int] = []
    image = None
    gc.collect()
    gc.disable()
    try:
        warm_until = clock() + int(seconds * 0.5e9)
        for _ in range(warm_up):
            image = call(latents.new())
            latents.check(image)
            if clock() > warm_until:
                break
        until = clock() + int(seconds * 1e9)
        while len(durations) < iterations and (len(durations) < LEAST_SAMPLES or clock() < until):
            latent = latents.new()
            # Assigning drops the image before it, so giving that one back is part of the price.
            started = clock()
            image = call(latent)
            stopped = clock()
            latents.check(image)
            durations.append(stopped - started)
    finally:
        gc.enable()
    return summary(durations)


def control(ping: Callable[[], Any], iterations: int, warm_up: int) -> dict:
    clock = time.perf_counter_ns
    gc.collect()
    gc.disable()
    try:
        for _ in range(warm_up):
            ping()
        durations = [0] * iterations
        for i in range(iterations):
            started = clock()
            ping()
            durations[i] = clock() - started
    finally:
        gc.enable()
    return summary(durations)
