"""Names of model files, with and without ComfyUI's folders. The folders are a stand-in's; needs no ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import luna_broker
import pytest
from luna_broker.comfyui import brokers, files
from luna_broker.comfyui.files import Source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of every kind of file."""
    module: Any = ModuleType("folder_paths")
    module.get_filename_list = lambda kind: sorted(path.name for path in tmp_path.glob("*.safetensors"))
    module.get_full_path = lambda kind, name: str(tmp_path / name) if (tmp_path / name).is_file() else None
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LISTED", {})


class Models:
    """A broker that has these."""

    def __init__(self, *models: tuple[str, str, str]) -> None:
        self._models = models

    def models(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "service": service, "path": path, "registered_by": None}
            for name, service, path in self._models
        ]


def test_a_file_of_comfyuis_is_its_path(folder: Path) -> None:
    (folder / "one.safetensors").touch()
    assert files.resolve("vae", "one.safetensors") == Source("one.safetensors", str(folder / "one.safetensors"))


def test_a_path_is_itself_and_anything_else_is_for_the_broker(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other.safetensors"
    elsewhere.touch()
    assert files.resolve("unet", str(elsewhere)).path == str(elsewhere)
    # What may run code is read by nobody here who names it by path: the broker refuses it.
    pickled = tmp_path / "other.ckpt"
    pickled.touch()
    assert files.resolve("unet", str(pickled)) == Source(str(pickled), None)
    assert files.resolve("unet", "/nowhere/x.safetensors") == Source("/nowhere/x.safetensors", None)
    assert files.resolve("unet", "x.safetensors") == Source("x.safetensors", None)


def test_without_comfyui_there_are_no_folders() -> None:
    assert files.resolve("clip", "x.safetensors") == Source("x.safetensors", None)


def test_a_broker_with_other_mounts_is_asked_by_name() -> None:
    asked = []

    def only_by_name(name: str) -> str:
        asked.append(name)
        if name != "x.safetensors":
            raise luna_broker.ModelNotFound(f"no file {name}")
        return "found"

    assert Source("x.safetensors", "/mine/x.safetensors").ask(only_by_name) == "found"
    assert asked == ["/mine/x.safetensors", "x.safetensors"]


def test_a_file_that_nobody_has_is_reported_by_its_path() -> None:
    def nobody(name: str) -> str:
        raise luna_broker.ModelNotFound(f"no file {name}")

    with pytest.raises(luna_broker.ModelNotFound, match="/mine/x"):
        Source("x", "/mine/x").ask(nobody)
    with pytest.raises(luna_broker.ModelNotFound, match="no file x"):
        Source("x", None).ask(nobody)


def test_choices_are_comfyuis_and_then_the_brokers_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own.safetensors").touch()
    models = Models(
        ("own.safetensors", "vae", str(folder / "own.safetensors")),
        ("same-file.safetensors", "vae", str(folder / "own.safetensors")),
        ("far.safetensors", "vae", "/far/far.safetensors"),
        ("sd.safetensors", "vae", "/far/sd.safetensors"),
        ("sd.safetensors", "unet", "/far/sd.safetensors"),
        ("sd.safetensors", "clip", "/far/sd.safetensors"),
        ("bare.safetensors", "unet", "/far/bare.safetensors"),
        ("/far/by-path.safetensors", "vae", "/far/by-path.safetensors"),
    )
    monkeypatch.setattr(brokers, "quick", lambda: models)
    assert files.choices("vae") == ["own.safetensors", "far.safetensors"]
    assert files.choices("checkpoint") == ["own.safetensors", "sd.safetensors"]
    assert files.choices("unet") == ["own.safetensors", "bare.safetensors"]


def test_without_a_broker_choices_are_comfyuis(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / "own.safetensors").touch()
    monkeypatch.setenv("LUNA_BROKER", str(tmp_path / "nobody.sock"))
    assert files.choices("vae") == ["own.safetensors"]


def test_a_broker_that_hangs_is_not_waited_for_again_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hangs() -> Models:
        asked.append("once")
        raise luna_broker.Timeout("no answer")

    monkeypatch.setattr(brokers, "quick", hangs)
    for kind in ("vae", "unet", "clip", "checkpoint"):
        assert files.choices(kind) == []
    assert asked == ["once"]
