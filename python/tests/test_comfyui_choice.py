"""Where models of a ComfyUI loader run. Needs neither ComfyUI nor a broker."""

from __future__ import annotations

import subprocess
import sys

import pytest
from luna_broker.comfyui.choice import Choice, Mode, Worker, choose

GPU, CPU = True, False


@pytest.mark.parametrize(
    ("worker", "mode"),
    [
        (Worker(CPU, "shm"), Mode.ATTACHED),
        (Worker(CPU, "local"), Mode.ATTACHED),
        (Worker(GPU, "cuda-ipc", broker_is_on_gpu=True), Mode.ATTACHED),
        (Worker(GPU, "cuda-vmm", broker_is_on_gpu=True), Mode.ATTACHED),
        (Worker(CPU, "shm", broker_is_on_gpu=True), Mode.REMOTE),
        (Worker(CPU, "inline"), Mode.REMOTE),
        (Worker(CPU, None), Mode.REMOTE),
        (Worker(GPU, "peer", broker_is_on_gpu=True), Mode.REMOTE),
        (Worker(GPU, "shm", broker_is_on_gpu=True), Mode.REMOTE),
        (Worker(GPU, "inline", broker_is_on_gpu=True), Mode.REMOTE),
        (Worker(CPU, "a rung of a later version"), Mode.REMOTE),
        (Worker(CPU, "shm", missing=("ModelPatcher.load",)), Mode.LOCAL),
        (Worker(CPU, "inline", missing=("ModelPatcher.load",)), Mode.REMOTE),
    ],
)
def test_auto_attaches_where_nothing_is_copied(worker: Worker, mode: Mode) -> None:
    assert choose(Mode.AUTO, lambda: worker).mode is mode


@pytest.mark.parametrize("wanted", [Mode.ATTACHED, Mode.REMOTE, Mode.LOCAL])
def test_what_was_asked_for_is_tried_whatever_stands_against_it(wanted: Mode) -> None:
    assert choose(wanted, lambda: pytest.fail("nothing else decides")).mode is wanted


@pytest.mark.parametrize("rung", ["shm", "peer", "inline", None])
def test_the_line_says_which_and_why(rung: str | None) -> None:
    choice = choose(Mode.AUTO, lambda: Worker(GPU, rung))
    assert str(choice) == f"{choice.mode.value}: {choice.why}"
    assert choice.why


def test_what_this_comfyui_lacks_is_named() -> None:
    choice = choose(Mode.AUTO, lambda: Worker(CPU, "shm", missing=("ModelPatcher.load", "VAE.decode")))
    assert choice == Choice(Mode.LOCAL, choice.why)
    assert "ModelPatcher.load, VAE.decode" in choice.why


def test_choosing_needs_neither_torch_nor_comfyui() -> None:
    code = "import sys, luna_broker.comfyui.choice; sys.exit('torch' in sys.modules or 'comfy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
