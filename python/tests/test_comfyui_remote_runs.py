"""When remote models open and close sampling runs, and what crosses in which step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from luna_broker import ConnectionLost, Stale
from luna_broker.comfyui.remote.runs import MOST_OPEN, Runs

X = torch.zeros(2, 4, 8, 8)
TIMES = torch.zeros(2)
CONTEXT = torch.arange(2 * 77 * 8, dtype=torch.float32).reshape(2, 77, 8)
STACK = (("style", 0.5),)


class Unet:
    """Records what it is asked."""

    def __init__(self) -> None:
        self.opened: list[Run] = []
        self.direct = 0
        self.fails: list[Exception] = []
        self.last = type("Call", (), {"step": {"adapters": []}})

    def run(self, **options: Any) -> Run:
        self.opened.append(Run(self, options))
        return self.opened[-1]

    def __call__(self, x: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        self.direct += 1
        return x


class Run:
    def __init__(self, unet: Unet, options: dict[str, Any]) -> None:
        self.unet, self.options = unet, options
        self.steps: list[dict[str, Any]] = []
        self.is_closed = False
        self.adapters: list[Any] = []

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, context: Any = None, **more: Any) -> torch.Tensor:
        if self.unet.fails:
            raise self.unet.fails.pop()
        self.steps.append({"context": context, **more})
        return x

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def unet() -> Unet:
    return Unet()


@pytest.fixture
def runs(unet: Unet) -> Runs:
    return Runs(unet, lambda taken: None)


def step(runs: Runs, context: torch.Tensor = CONTEXT, y: Any = None, stack: Any = STACK, **options: Any) -> Any:
    return runs.step(stack, X, TIMES, context, y, None, {"uuids": ["negative", "positive"], **options})


def test_a_conditioning_crosses_once_in_a_run(unet: Unet, runs: Runs) -> None:
    for _ in range(3):
        # ComfyUI puts the rows together anew for each step.
        step(runs, CONTEXT.clone(), y=torch.ones(2, 5))
    (run,) = unet.opened
    assert [each["context"] is not None for each in run.steps] == [True, False, False]
    assert run.steps[1].get("y") is None
    assert run.steps[0]["conds"] == run.steps[1]["conds"] == [0, 1]
    assert run.options["loras"] == STACK


@pytest.mark.parametrize("changed", [{"context": CONTEXT + 1}, {"y": torch.zeros(2, 5)}, {"context": CONTEXT[:, :70]}])
def test_a_changed_conditioning_crosses_again(unet: Unet, runs: Runs, changed: dict[str, Any]) -> None:
    step(runs, y=torch.ones(2, 5))
    step(runs, **{"y": torch.ones(2, 5), **changed})
    assert unet.opened[0].steps[1]["context"] is not None


def test_one_conditioning_of_two_is_known_by_its_number(unet: Unet, runs: Runs) -> None:
    step(runs)
    runs.step(STACK, X[:1], TIMES[:1], CONTEXT[1:], None, None, {"uuids": ["positive"]})
    assert unet.opened[0].steps[1] == {"context": None, "control": None, "conds": [1]}


def test_each_set_of_patches_has_a_run_of_its_own(unet: Unet, runs: Runs) -> None:
    for stack in (STACK, (), STACK):
        step(runs, stack=stack)
    assert len(unet.opened) == 2
    assert len(unet.opened[0].steps) == 2


def test_runs_are_closed_when_sampling_ends_and_when_there_are_too_many(unet: Unet, runs: Runs) -> None:
    for number in range(MOST_OPEN + 1):
        step(runs, stack=((f"style {number}", 1.0),))
    assert [run.is_closed for run in unet.opened] == [True] + [False] * MOST_OPEN
    runs.close()
    assert all(run.is_closed for run in unet.opened)
    assert runs.open == 0


def test_a_run_that_the_broker_ended_is_opened_again_with_everything(unet: Unet, runs: Runs) -> None:
    step(runs)
    unet.fails = [Stale("gone")]
    step(runs)
    assert [len(run.steps) for run in unet.opened] == [1, 1]
    assert unet.opened[1].steps[0]["context"] is not None
    unet.fails = [Stale("gone"), Stale("gone")]
    with pytest.raises(Stale):
        step(runs)


def test_after_a_lost_connection_nothing_is_taken_as_sent(unet: Unet, runs: Runs) -> None:
    step(runs)
    unet.fails = [ConnectionLost("gone")]
    with pytest.raises(ConnectionLost):
        step(runs)
    step(runs)
    assert unet.opened[-1].steps[0]["context"] is not None


def test_calls_without_conditionings_names_open_no_run(unet: Unet, runs: Runs) -> None:
    runs.step(STACK, X, TIMES, CONTEXT, None, None, {})
    # Three cannot share two rows evenly.
    runs.step(STACK, X, TIMES, CONTEXT, None, None, {"uuids": ["a", "b", "c"]})
    assert (unet.direct, unet.opened) == (2, [])


def test_the_block_cache_and_the_noise_levels_are_of_the_run(unet: Unet, runs: Runs) -> None:
    cache = {"threshold": 0.1, "start": 0.2, "end": 0.9, "max_hits": None}
    falling = torch.tensor([14.6, 3.0, 0.0])
    step(runs, luna_broker={"fb_cache": cache}, sample_sigmas=falling)
    assert unet.opened[0].options["fb_cache"] == cache
    assert unet.opened[0].options["sigmas"] == pytest.approx([14.6, 3.0, 0.0])
    step(runs, sample_sigmas=falling)
    assert unet.opened[1].options["fb_cache"] is None
    runs.close()
    step(runs, luna_broker={"fb_cache": cache}, sample_sigmas=falling.flip(0))
    assert unet.opened[-1].options["sigmas"] is None, "noise levels that rise are no schedule to reckon with"
