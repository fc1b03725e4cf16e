"""The smallest things a round is made of: one peer, one variant, one size, measured once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import names
from .figures import Key
from .names import NO_SIZE
from .programs import PeerProcess, Server, confine, run_json
from .sizes import Size


@dataclass(frozen=True)
class Limits:
    """How much is measured; `seconds` is per unit and round."""

    rounds: int
    seconds: float
    iterations: int = 2000
    warm_up: int = 200
    control_iterations: int = 20000
    control_warm_up: int = 2000


@dataclass(frozen=True)
class Unit:
    keys: tuple[Key, ...]
    measure: Callable[[Limits], dict[Key, dict]]
    verify: Callable[[], dict] | None = None


@contextmanager
def one_core(pids: Sequence[int], core: int) -> Iterator[None]:
    """Takes placement and cross-core wake-ups out of a round trip: what is left is the length of the software path."""
    everywhere = os.sched_getaffinity(0)
    try:
        for pid in pids:
            confine(pid, {core})
        yield
    finally:
        for pid in pids:
            confine(pid, everywhere)


@dataclass(frozen=True)
class Placement:
    """Where a pair of processes runs: confined to `core`, or only started there and then left to the scheduler."""

    pids: tuple[int, ...]
    core: int
    confined: bool = False


def hand_off(row: str, peer: PeerProcess, variant: str, size: Size, placement: Placement | None = None) -> Unit:
    key = (row, size.name)
    what = {"variant": variant, "size": size.as_json()}

    def measure(limits: Limits) -> dict[Key, dict]:
        amounts = {
            "iterations": limits.iterations,
            "warm_up": limits.warm_up,
            "seconds": limits.seconds,
        }
        if placement is None:
            return {key: peer.ask("hand_off", **what, **amounts)}
        with one_core(placement.pids, placement.core):
            if placement.confined:
                return {key: peer.ask("hand_off", **what, **amounts)}
            # The scheduler tends to leave a pair where it is, so all pairs start from the same place.
            peer.ask("hand_off", **what, iterations=20, warm_up=0, seconds=0.01)
        return {key: peer.ask("hand_off", **what, **amounts)}

    return Unit((key,), measure, lambda: peer.ask("verify", **what))


def python_ping(peer: PeerProcess, server: Server, core: int) -> Unit:
    key = (names.LUNA_PING, NO_SIZE)

    def measure(limits: Limits) -> dict[Key, dict]:
        with one_core((peer.pid, server.pid), core):
            return {key: peer.ask("control", iterations=limits.control_iterations, warm_up=limits.control_warm_up)}

    return Unit((key,), measure)


def floor(program: Path, core: int) -> Unit:
    key = (names.FLOOR, NO_SIZE)

    def measure(limits: Limits) -> dict[Key, dict]:
        return {
            key: run_json(
                [
                    str(program),
                    str(limits.control_iterations),
                    str(limits.control_warm_up),
                    str(core),
                ]
            )
        }

    return Unit((key,), measure)


def rust_one_core(program: str, server: Server, size: Size, core: int) -> Unit:
    """The Rust client measures both subjects in one run; its own flag confines it, the broker is confined here."""
    ping, image = (names.RUST_PING, NO_SIZE), (names.RUST_ONE_CORE, size.name)

    def measure(limits: Limits) -> dict[Key, dict]:
        with one_core((server.pid,), core):
            command = _rust_command(program, server, [size], limits.control_iterations, limits.control_warm_up)
            measured = run_json([*command, "--core", str(core)])
        return {ping: measured["control"], image: measured["hand_off"][0]}

    return Unit((ping, image), measure)


def rust_hand_off(program: str, server: Server, sizes: Sequence[Size]) -> Unit:
    keys = tuple((names.RUST, size.name) for size in sizes)

    def measure(limits: Limits) -> dict[Key, dict]:
        measured = run_json(_rust_command(program, server, sizes, limits.iterations, limits.warm_up))
        return dict(zip(keys, measured["hand_off"], strict=True))

    return Unit(keys, measure)


def _rust_command(program: str, server: Server, sizes: Sequence[Size], iterations: int, warm_up: int) -> list[str]:
    command = [program, "bench", "--socket", str(server.socket_path), "--json"]
    command += ["--iterations", str(iterations), "--warm-up", str(warm_up)]
    for size in sizes:
        command += ["--latent", f"{size.side}x{size.side}"]
    return command
