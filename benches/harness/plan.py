"""What is measured: every unit of a round, in groups whose members are compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import names, units
from .line_up import INLINE, LUNA, PICKLE, PIPE, RAW, REFERENCE, LineUp
from .programs import ProgramFailed
from .sizes import FIXED_LATENT, GROWING_LATENT, LARGE, MIDDLE, Size
from .units import Placement, Unit

CONTROL, ONE_CORE = "control", "one core"


class Plan:
    def __init__(self, line_up: LineUp, sizes: tuple[Size, ...], core: int, movers_at_large: bool) -> None:
        self.groups: dict[str, list[Unit]] = {CONTROL: [], ONE_CORE: []}
        self._line_up = line_up
        self._sizes = sizes
        self._core = core
        # Peers that move every byte take most of a run's time at 100 MB, and no bar needs them there.
        self._mover_sizes = [size for size in sizes if movers_at_large or size.name != LARGE]
        self._middle = next(size for size in sizes if size.name == MIDDLE)
        self._add_control()
        self._add_hand_off(REFERENCE, names.REFERENCE, "in place", sizes)
        self._add_hand_off(REFERENCE, names.ONE_COPY, "one copy", self._mover_sizes)
        self._add_hand_off(RAW, names.RAW, "bytes", self._mover_sizes)
        self._add_hand_off(PIPE, names.PIPE, "in place", sizes)
        self._add_hand_off(PICKLE, names.PICKLE, "bytes", self._mover_sizes)
        self._add_hand_off(LUNA, names.LUNA, "in place", sizes)
        self._add_hand_off(LUNA, names.LUNA_ONE_COPY, "one copy", self._mover_sizes)
        self._add_hand_off(INLINE, names.LUNA_INLINE, "bytes", self._mover_sizes)
        self._add_one_core(REFERENCE, names.REFERENCE_ONE_CORE)
        self._add_one_core(LUNA, names.LUNA_ONE_CORE)
        self._add_rust()

    def _add_control(self) -> None:
        line_up = self._line_up
        if line_up.floor is not None:
            self.groups[CONTROL].append(units.floor(line_up.floor, self._core))
        if LUNA in line_up.peers and line_up.broker is not None:
            self.groups[CONTROL].append(units.python_ping(line_up.peers[LUNA], line_up.broker, self._core))

    def _add_hand_off(self, name: str, row: str, variant: str, sizes: Sequence[Size]) -> None:
        if name in self._line_up.peers:
            for size in sizes:
                unit = units.hand_off(row, self._line_up.peers[name], variant, size, self._placement(name))
                self.groups.setdefault(size.name, []).append(unit)

    def _add_one_core(self, name: str, row: str) -> None:
        placement = self._placement(name)
        if placement is not None:
            placement = replace(placement, confined=True)
            unit = units.hand_off(row, self._line_up.peers[name], "in place", self._middle, placement)
            self.groups[ONE_CORE].append(unit)

    def _placement(self, name: str) -> Placement | None:
        """None for a peer that starts its server itself: no bar compares its placement."""
        server = self._line_up.server_of(name)
        if server is None or name not in self._line_up.peers:
            return None
        return Placement((self._line_up.peers[name].pid, server.pid), self._core)

    def _add_rust(self) -> None:
        broker, program = self._line_up.broker, self._line_up.broker_program
        if broker is None or program is None:
            return
        self.groups[CONTROL].append(units.rust_one_core(program, broker, self._middle, self._core))
        # `bench` names latents only, so it takes part where the do-nothing model keeps its usual ratio.
        usual = [size for size in self._sizes if size.ratio == self._middle.ratio]
        self.groups.setdefault(MIDDLE, []).append(units.rust_hand_off(program, broker, usual))


def choose_sizes(latents: str, line_up: LineUp) -> tuple[Size, ...]:
    """A latent of constant size where the broker can answer it at all three image sizes."""
    if latents == "growing":
        return GROWING_LATENT
    if latents == "auto" and LUNA in line_up.peers:
        try:
            for size in FIXED_LATENT:
                line_up.peers[LUNA].ask("verify", variant="in place", size=size.as_json())
        except ProgramFailed:
            return GROWING_LATENT
    return FIXED_LATENT
