"""Workers that share a GPU: how they are counted, and what ends the counting."""

from __future__ import annotations

import luna_broker
import sdxl_worker
import sdxl_workers
import torch
from sdxl_scene import Scene


def test_workers_of_every_kind_run_and_agree(played):
    found = played("sdxl_workers")
    kinds = [sdxl_worker.ATTACHED, sdxl_worker.REMOTE, sdxl_worker.PRIVATE]
    rows = found["workers that fit into 32 GB and run"]
    assert [(row["kind"], row["workers"], row["is_right"]) for row in rows] == [(kind, 2, True) for kind in kinds]
    assert [row["workers"] for row in found["workers"]] == [1, 2] * 3
    assert all(row["GB"] > 0 for row in found["workers"])


class Fake:
    """A worker that answers from a list, whose last answer is also that to all that comes behind."""

    def __init__(self, *answers: dict, output: float = 1.0) -> None:
        self._answers, self._output = [*answers, *[answers[-1]] * 20], output

    def ask(self, _what: str) -> dict:
        return self._answers.pop(0)

    def begin(self, _what: str) -> None:
        pass

    def hear(self) -> dict:
        return self._answers.pop(0)

    def output(self) -> torch.Tensor:
        return torch.full((4,), self._output)


GOOD = {"seconds": 0.1}, {"seconds": [0.1, 0.2]}
FULL_UP = {"error": "OutOfMemoryError: CUDA out of memory", "is_no_memory": True}
BROKEN = {"error": "RuntimeError: illegal memory access", "is_no_memory": False}


def grown(*workers: Fake) -> sdxl_workers.Series:
    return sdxl_workers.grow(sdxl_workers.Series("kind"), workers, lambda: 10, 1e-3)


def test_workers_are_counted_until_one_does_not_fit():
    series = grown(Fake(*GOOD), Fake(*GOOD), Fake(FULL_UP, {}), Fake(*GOOD))
    assert (series.fit, series.is_right, series.stopped_by) == (2, True, FULL_UP["error"])
    # One that loads and then has no memory to run does not fit.
    assert grown(Fake(*GOOD), Fake({"seconds": 0.1}, FULL_UP)).fit == 1
    series = grown(Fake(*GOOD), Fake(*GOOD))
    assert (series.fit, series.stopped_by) == (2, "as many as were tried")


def test_a_worker_that_fails_otherwise_or_computes_something_else_is_a_fault():
    assert not grown(Fake(*GOOD), Fake(BROKEN, {})).is_right
    # It counts, also beside one that fails for want of memory.
    assert grown(Fake(*GOOD, FULL_UP), Fake({"seconds": 0.1}, BROKEN)).stopped_by == BROKEN["error"]
    assert not grown(Fake(*GOOD), Fake(*GOOD, output=1.1)).is_right
    assert not grown(Fake(*GOOD), Fake(*GOOD, output=float("nan"))).is_right


def test_want_of_memory_is_told_from_other_faults():
    assert sdxl_worker.is_no_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"))
    assert sdxl_worker.is_no_memory(RuntimeError("CUDA error: out of memory"))
    assert sdxl_worker.is_no_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not sdxl_worker.is_no_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not sdxl_worker.is_no_memory(luna_broker.ConnectionLost("the broker is gone"))


def test_a_worker_that_dies_is_heard_of(scene: Scene):
    worker = sdxl_workers.Process(scene, sdxl_worker.PRIVATE, 0, "")
    try:
        assert worker.hear() == {"is_ready": True}
        worker._process.kill()
        assert worker.ask("load") == {"error": "it ended with -9", "is_no_memory": False}
    finally:
        worker.end()
