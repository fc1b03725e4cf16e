"""What becomes of a model that cannot be had as asked for. The ways of loading are stand-ins; needs no ComfyUI."""

from __future__ import annotations

import math
from typing import Any

import luna_broker
import pytest
from luna_broker.comfyui import brokers, compat, loading, notices
from luna_broker.comfyui.choice import Mode, Worker
from luna_broker.comfyui.loaded import Loaded

ATTACHED_WORKER = Worker(is_on_gpu=False, rung="shm")


class World:
    """A broker, a worker and a disk, each with its troubles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.absent: Exception | None = None
        self.refused: Exception | None = None
        self.is_on_disk = True
        self.worker = ATTACHED_WORKER
        self.tried: list[str] = []
        self.lines: list[str] = []
        self.lacks: list[str] = []
        self.is_known = True
        monkeypatch.setattr(compat, "missing", lambda kind: self.lacks)
        monkeypatch.setattr(compat, "is_known", lambda: self.is_known)
        monkeypatch.setattr(brokers, "client", self._client)
        monkeypatch.setattr(brokers, "generation", lambda address: f"life of {address}")
        monkeypatch.setattr(loading, "_worker", self._worker)
        monkeypatch.setattr(loading, "_by_broker", self._by_broker)
        monkeypatch.setattr(loading, "_local", self._local)
        monkeypatch.setattr(notices, "tell", lambda node, text, warning=False: self.lines.append(text))

    def _worker(self, wanted: Any) -> Worker:
        if self.absent:
            raise self.absent
        return self.worker

    def _client(self, address: str) -> Any:
        if self.absent:
            raise self.absent
        return object()

    def _by_broker(self, client: Any, wanted: Any, sources: Any, choice: Any) -> Loaded:
        self.tried.append(choice.mode.value)
        if self.refused:
            raise self.refused
        return Loaded(choice, model="model")

    def _local(self, wanted: Any, sources: Any, choice: Any) -> Loaded:
        self.tried.append("local")
        return Loaded(choice, model="local model")

    def load(self, mode: str, on_failure: str = "error") -> Loaded:
        return loading.load("unet", ["a.safetensors"], mode, on_failure, "/a.sock")

    def changed(self, mode: str, on_failure: str = "error") -> str | float:
        return loading.changed("unet", ["a.safetensors"], mode, on_failure, "/a.sock")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_auto_is_what_suits_and_says_so(world: World) -> None:
    assert world.load("auto").choice.mode is Mode.ATTACHED
    (line,) = world.lines
    assert "a.safetensors is attached: on the rung shm" in line
    assert world.tried == ["attached"]


@pytest.mark.parametrize(
    "trouble",
    [
        luna_broker.ConnectionLost("no broker answers at /a.sock"),
        luna_broker.ConfigurationError("that is no address"),
        luna_broker.Refused("another version"),
        luna_broker.Timeout("busy beyond the deadline"),
    ],
)
def test_without_a_broker_auto_is_local_whatever_failures_are_to_be(world: World, trouble: Exception) -> None:
    world.absent = trouble
    assert world.load("auto").choice.mode is Mode.LOCAL
    assert str(trouble) in world.lines[0] and "local" in world.lines[0]


def test_auto_is_local_where_the_broker_does_not_support_the_model(world: World) -> None:
    world.refused = luna_broker.Unsupported("a structure that is not run")
    loaded = world.load("auto")
    assert (loaded.choice.mode, loaded.model) == (Mode.LOCAL, "local model")
    assert world.tried == ["attached", "local"]
    assert "a structure that is not run" in world.lines[0]


def test_an_unknown_comfyui_makes_auto_local_with_the_reason(world: World) -> None:
    world.worker = Worker(is_on_gpu=False, rung="shm", missing=("ModelPatcher.load",))
    assert world.load("auto").choice.mode is Mode.LOCAL
    assert world.tried == ["local"]
    assert "ModelPatcher.load" in world.lines[0]


@pytest.mark.parametrize("mode", ["attached", "remote"])
def test_what_this_comfyui_has_otherwise_is_named_before_anything_is_tried(world: World, mode: str) -> None:
    world.lacks = ["ModelPatcher.load", "VAE.decode"]
    assert world.load(mode, "local").choice.mode is Mode.LOCAL
    assert "ModelPatcher.load, VAE.decode" in world.lines[0]
    assert world.tried == ["local"]
    with pytest.raises(luna_broker.Unsupported, match="ModelPatcher.load"):
        world.load(mode)


@pytest.mark.parametrize("trouble", [AttributeError("no patches"), TypeError("an argument"), ImportError("comfy.x")])
def test_what_fails_in_another_comfyui_is_refused_and_in_this_one_a_fault(world: World, trouble: Exception) -> None:
    world.refused = trouble
    with pytest.raises(type(trouble)):
        world.load("auto")
    world.is_known = False
    assert world.load("auto").choice.mode is Mode.LOCAL
    assert str(trouble) in world.lines[0]


@pytest.mark.parametrize("mode", ["attached", "remote"])
def test_a_mode_by_name_is_had_or_is_an_error(world: World, mode: str) -> None:
    assert world.load(mode).choice.mode.value == mode
    world.refused = luna_broker.Unsupported("no")
    with pytest.raises(luna_broker.Unsupported):
        world.load(mode)
    world.absent = luna_broker.ConnectionLost("nobody")
    with pytest.raises(luna_broker.ConnectionLost):
        world.load(mode)


@pytest.mark.parametrize("mode", ["attached", "remote"])
def test_a_failure_may_end_in_a_local_model(world: World, mode: str) -> None:
    world.refused = luna_broker.Unsupported("no such structure")
    assert world.load(mode, "local").choice.mode is Mode.LOCAL
    assert f"{mode} could not be had: no such structure" in world.lines[0]


def test_cancelling_is_no_failure(world: World) -> None:
    world.refused = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.load("attached", "local")
    assert world.tried == ["attached"]


def test_local_asks_no_broker(world: World) -> None:
    world.absent = AssertionError("a broker was asked")
    assert world.load("local").choice.mode is Mode.LOCAL
    assert world.changed("local") == ""


def test_a_loader_runs_again_after_a_restart_and_after_a_broker_was_busy(world: World) -> None:
    world.load("auto")
    assert world.changed("auto") == "life of /a.sock"
    for trouble in (luna_broker.Busy("full"), luna_broker.Timeout("late"), luna_broker.OutOfMemory("full")):
        world.refused = trouble
        world.load("auto")
        assert math.isnan(float(world.changed("auto")))
    assert world.changed("auto", "local") == "life of /a.sock", "another node's luck"
    world.refused = None
    world.load("auto")
    assert world.changed("auto") == "life of /a.sock"


def test_a_loader_runs_again_after_a_broker_was_busy_beyond_the_deadline(world: World) -> None:
    world.absent = luna_broker.Timeout("busy")
    world.load("auto")
    assert math.isnan(float(world.changed("auto")))


def test_a_refusal_for_good_does_not_make_a_loader_run_again(world: World) -> None:
    world.refused = luna_broker.Unsupported("never")
    world.load("auto")
    assert world.changed("auto") == "life of /a.sock"


def test_a_file_that_nobody_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(address: str) -> Any:
        raise luna_broker.ConnectionLost("no broker answers at /a.sock")

    monkeypatch.setattr(brokers, "client", nobody)
    monkeypatch.setattr(loading, "_worker", lambda wanted: nobody(""))
    with pytest.raises(luna_broker.ModelNotFound, match="nothing.safetensors.*no broker answers"):
        loading.load("vae", ["nothing.safetensors"], "auto", "local", "/a.sock")
