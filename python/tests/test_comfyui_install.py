"""Putting the pack into a ComfyUI and taking it out. Needs no ComfyUI: its folders are enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import luna_broker
import pytest
from luna_broker.__main__ import main
from luna_broker.comfyui.install import PACK, NotInstalled, install, uninstall

if sys.version_info >= (3, 11):
    import tomllib


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "comfy").mkdir()
    (folder / "main.py").touch()
    return folder


@pytest.fixture
def place(comfyui: Path) -> Path:
    return comfyui / "custom_nodes" / "luna-broker"


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lets nobody make links."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)


def left_over(comfyui: Path) -> list[str]:
    return sorted(path.name for path in (comfyui / "custom_nodes").iterdir())


def test_the_pack_is_linked_and_stays_so(comfyui: Path, place: Path) -> None:
    assert f"{place} is now a link to {PACK}" in install(comfyui)
    assert place.resolve() == PACK
    assert "nothing was changed" in install(comfyui)
    assert place.resolve() == PACK
    assert left_over(comfyui) == ["luna-broker"]


def test_a_link_is_taken_away_and_the_pack_is_not(comfyui: Path, place: Path) -> None:
    install(comfyui)
    assert "was taken away" in uninstall(comfyui)
    assert left_over(comfyui) == []
    assert (PACK / "pyproject.toml").is_file()
    assert "nothing was changed" in uninstall(comfyui)


@pytest.mark.usefixtures("without_links")
def test_where_no_links_can_be_made_the_pack_is_copied(comfyui: Path, place: Path) -> None:
    done = install(comfyui)
    assert "a copy of" in done
    assert "privilege" in done
    assert not place.is_symlink()
    assert (place / "pyproject.toml").read_bytes() == (PACK / "pyproject.toml").read_bytes()
    assert not list(place.rglob("__pycache__"))
    (place / "pyproject.toml").write_text((place / "pyproject.toml").read_text() + "# of an earlier version\n")
    (place / "gone.py").touch()
    assert "instead of a copy of the pack" in install(comfyui)
    assert (place / "pyproject.toml").read_bytes() == (PACK / "pyproject.toml").read_bytes()
    assert not (place / "gone.py").exists()
    assert left_over(comfyui) == ["luna-broker"]
    uninstall(comfyui)
    assert left_over(comfyui) == []


@pytest.mark.parametrize("target", ["nowhere", "earlier"])
def test_a_link_to_an_earlier_place_of_the_pack_is_replaced(comfyui: Path, place: Path, target: str) -> None:
    earlier = comfyui.parent / "earlier"
    earlier.mkdir()
    (earlier / "pyproject.toml").write_text((PACK / "pyproject.toml").read_text())
    place.symlink_to(comfyui.parent / target)
    assert f"instead of a link to {comfyui.parent / target}" in install(comfyui)
    assert place.resolve() == PACK
    assert (earlier / "pyproject.toml").is_file()


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("do", [install, uninstall])
def test_what_is_not_the_packs_is_left_alone(comfyui: Path, place: Path, is_link: bool, do: Any) -> None:
    other = comfyui.parent / "other" if is_link else place
    other.mkdir()
    (other / "precious.py").write_text("1")
    if is_link:
        place.symlink_to(other)
    with pytest.raises(NotInstalled, match="not this pack, and was left as it is"):
        do(comfyui)
    assert (place / "precious.py").read_text() == "1"
    assert left_over(comfyui) == ["luna-broker"]


def test_a_copy_that_fails_leaves_what_was_there(
    comfyui: Path, place: Path, without_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(comfyui)

    def fail(_source: Path, target: Path, **_options: Any) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", fail)
    with pytest.raises(NotInstalled, match="No space left"):
        install(comfyui)
    assert (place / "pyproject.toml").is_file()
    assert left_over(comfyui) == ["luna-broker"]


def test_a_base_directory_and_a_portable_comfyui_will_do(comfyui: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    (base / "models").mkdir()
    install(base)
    assert (base / "custom_nodes" / "luna-broker").resolve() == PACK
    install(comfyui.parent)
    assert (comfyui / "custom_nodes" / "luna-broker").resolve() == PACK


@pytest.mark.parametrize("folder", ["nowhere", "empty", "only_nodes"])
def test_what_is_no_comfyui_is_refused(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_nodes" / "custom_nodes").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["comfyui", str(tmp_path / folder)]) == 1
    told = capsys.readouterr()
    assert f"error: {tmp_path / folder} is no ComfyUI" in told.err
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_installs_and_uninstalls(
    comfyui: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["comfyui", str(comfyui)]) == 0
    told = capsys.readouterr().out
    assert f"{place} is now a link" in told
    assert sys.executable in told
    assert main(["comfyui", str(comfyui), "--uninstall"]) == 0
    assert "was taken away" in capsys.readouterr().out
    assert not place.exists()


def test_by_itself_it_looks_for_the_package(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, str(PACK / "install.py")]
        # Neither the repository nor what is installed: only what the options leave.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if not options:
            environment["PYTHONPATH"] = str(PACK.parents[1])
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    there = run()
    assert (there.returncode, there.stderr) == (0, "")
    absent = run("-I", "-S")
    assert absent.returncode == 1
    assert "pip install luna-broker" in absent.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python reads no TOML")
def test_the_registry_is_told_the_packages_version_and_the_comfyui_that_is_supported() -> None:
    from luna_broker.comfyui.compat import SUPPORTED

    described = tomllib.loads((PACK / "pyproject.toml").read_text())
    project, comfy = described["project"], described["tool"]["comfy"]
    assert project["version"] == luna_broker.__version__
    assert project["dependencies"] == [f"luna-broker=={luna_broker.__version__}"]
    assert (PACK / "requirements.txt").read_text().split() == project["dependencies"]
    assert comfy["requires-comfyui"] == f">={SUPPORTED}"
    assert comfy["PublisherId"]
