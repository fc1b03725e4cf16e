"""Where a loader's models are to run, and the sentence that says why. Knows neither ComfyUI nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

# Rungs on which weights and tensors are the broker's memory itself.
WITHOUT_COPIES_ON_GPU = frozenset({"cuda-ipc", "cuda-vmm"})
WITHOUT_COPIES_ON_CPU = frozenset({"shm", "local"})


class Mode(str, Enum):
    """How a model is had. `AUTO` is what a loader is asked for, never what came of it."""

    AUTO = "auto"
    ATTACHED = "attached"
    """This process computes, with the broker's weights."""
    REMOTE = "remote"
    """The broker computes."""
    LOCAL = "local"
    """This process computes, with weights of its own."""


class OnFailure(str, Enum):
    """What becomes of a model that cannot be had as asked for."""

    LOCAL = "local"
    ERROR = "error"


@dataclass(frozen=True)
class Choice:
    """A mode and why it was chosen: never `AUTO`, never without a reason."""

    mode: Mode
    why: str

    def __str__(self) -> str:
        return f"{self.mode.value}: {self.why}"


@dataclass(frozen=True)
class Worker:
    """What matters of this process for the choice."""

    is_on_gpu: bool
    """Whether it computes on a GPU."""
    rung: str | None
    """Rung to the broker for the device it computes on; `None` where nothing is shared for that device."""
    broker_is_on_gpu: bool = False
    """Whether the broker computes on a GPU."""
    missing: Sequence[str] = ()
    """What this ComfyUI lacks, or has otherwise, of what attached models need."""


def choose(wanted: Mode, look: Callable[[], Worker]) -> Choice:
    """The way to try first. What stands against it is found out by trying. `look`: asked where that decides."""
    if wanted is not Mode.AUTO:
        return Choice(wanted, "as asked for")
    worker = look()
    if worker.rung is None:
        return Choice(Mode.REMOTE, "no memory is shared with the broker")
    if not worker.is_on_gpu and worker.broker_is_on_gpu:
        return Choice(Mode.REMOTE, "this worker has no GPU, the broker has one")
    free = WITHOUT_COPIES_ON_GPU if worker.is_on_gpu else WITHOUT_COPIES_ON_CPU
    if worker.rung not in free:
        return Choice(Mode.REMOTE, f"on the rung {worker.rung} weights would be copied")
    if worker.missing:
        return Choice(Mode.LOCAL, f"this ComfyUI is not as attached models need it: {', '.join(worker.missing)}")
    return Choice(Mode.ATTACHED, f"on the rung {worker.rung} weights are used where they lie, without a copy")
