"""What the tests of the steps about SDXL share: a small model, and the real broker."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manifest import Artifact, Manifest
from programs import Deadline
from sdxl_scene import Scene
from steps import STEPS, Bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
    # Where it was turned off for a whole program.
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def broker() -> str:
    return os.environ.get("LUNA_BROKER_BIN", str(ROOT / "target" / "release" / "luna-broker"))


@pytest.fixture(scope="session")
def bench(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("sdxl")
    artifact = Artifact("luna-broker", "program", broker, 1, "", [], None, None)
    return Bench(Manifest("c0ffee", False, {}, {"bytes": 1}, 1, [artifact], folder), folder, False, 1)


@pytest.fixture
def scene(bench: Bench, broker: str, no_gradients: None) -> Scene:
    scene = Scene(argparse.Namespace(broker=broker, place="cpu", size=None, folder=bench.folder, rounds=1))
    scene.write_unet()
    return scene


@pytest.fixture
def played(bench: Bench) -> Callable[[str], dict]:
    """Plays a step as it is played without a GPU."""

    def play(name: str) -> dict:
        (step,) = [step for step in STEPS if step.name == name]
        return step.play(bench, Deadline(120))

    return play
