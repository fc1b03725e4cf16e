"""Proof once, then rounds in which all units take turns in a different order each time."""

from __future__ import annotations

import random
from collections.abc import Callable

from .figures import Figures
from .programs import ProgramFailed
from .units import Limits, Unit


class Rounds:
    def __init__(self, groups: dict[str, list[Unit]]) -> None:
        self.figures = Figures()
        self.failures: dict[str, str] = {}
        self.proofs: dict[str, dict] = {}
        self._groups = groups

    def verify(self) -> None:
        """Everything an answer holds is compared once per size; a peer that fails is not measured."""
        for name, group in self._groups.items():
            self._groups[name] = [unit for unit in group if self._verified(unit)]

    def measure(self, limits: Limits, progress: Callable[[int], None]) -> None:
        for number in range(limits.rounds):
            progress(number)
            order = random.Random(number)
            for name, group in self._groups.items():
                order.shuffle(group)
                self._groups[name] = [unit for unit in group if self._measured(unit, limits, number)]

    def _verified(self, unit: Unit) -> bool:
        if unit.verify is None:
            return True
        try:
            self.proofs[label(unit)] = unit.verify()
        except ProgramFailed as failure:
            self.failures[label(unit)] = str(failure)
            return False
        return True

    def _measured(self, unit: Unit, limits: Limits, number: int) -> bool:
        try:
            for key, measured in unit.measure(limits).items():
                self.figures.add(key, number, measured)
        except (ProgramFailed, KeyError, IndexError, ValueError, OSError) as failure:
            self.failures[label(unit)] = f"{type(failure).__name__}: {failure}"
            for key in unit.keys:
                self.figures.drop(key)
            return False
        return True


def label(unit: Unit) -> str:
    return "; ".join(f"{row}, {size}" if size else row for row, size in unit.keys)
