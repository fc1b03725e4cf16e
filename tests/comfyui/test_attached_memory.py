"""What attached models do with memory, seen from inside a process that has ComfyUI's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luna_broker
import pytest

SCRIPT = Path(__file__).with_name("attached_worker.py")

# Of a checkpoint for SD 1.5: a text projection that the file lacks, and what is made of settings.
PRIVATE_BYTES = 2_000_000


class Inside:
    """The process: each call has it do one thing, and returns the facts that it gives."""

    def __init__(self, *arguments: str) -> None:
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(SCRIPT), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.loaded = self._facts()

    def __call__(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._facts()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _facts(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended with code {self._process.wait()}"
        return dict(json.loads(line))


@pytest.fixture(scope="module")
def start(checkout: Path, models: Path) -> Iterator[Any]:
    started = []

    def begin(broker: Any) -> Inside:
        files = [str(models / name) for name in ("checkpoints/small.safetensors", "loras/lora.safetensors")]
        started.append(Inside(str(checkout), broker.address, *files))
        return started[-1]

    yield begin
    for process in started:
        process.end()


@pytest.fixture(scope="module")
def inside(start: Any, broker: Any) -> Inside:
    return start(broker)


def merged_sets(broker: Any) -> list[dict[str, Any]]:
    with luna_broker.connect(broker.address) as client:
        held = client.status()["weights"]
    return [weights for weights in held if any(name.startswith("comfyui-merged-") for name in weights["names"])]


def picture(facts: dict[str, Any]) -> tuple[Any, Any]:
    return facts["image"], facts["latent"]


def test_every_weight_is_the_brokers_but_what_is_named(inside: Inside) -> None:
    assert inside.loaded["mode"] == "attached"
    assert inside.loaded["private"] == {}
    assert 0 < sum(inside.loaded["expected"].values()) < PRIVATE_BYTES
    assert inside.loaded["shared"] > 100 * PRIVATE_BYTES


def test_comfyui_is_told_that_nothing_of_it_is_this_processs(inside: Inside) -> None:
    # One byte for each part: ComfyUI takes none for not knowing.
    assert inside.loaded["accounted"] == 3


def test_a_lora_is_merged_beside_the_weights_and_shared(inside: Inside, broker: Any) -> None:
    before = inside("plain")
    adapted = inside("adapted")
    assert adapted["latent"] != before["latent"]
    assert adapted["diverged"] == 0
    assert adapted["untouched"], "layers were copied that no LoRA is about"
    assert adapted["backup_is_shared"], "what was there before was copied"
    assert adapted["views"] > 0 and adapted["accounted"] == adapted["loaded"] == 1
    assert adapted["patched_bytes"] in [weights["bytes"] for weights in merged_sets(broker)]
    assert inside("plain") == before


def test_merged_weights_that_are_not_shared_are_accounted_for_and_can_be_given_back(inside: Inside) -> None:
    shared = inside("adapted")
    own = inside("adapted_for_itself")
    assert picture(own) == picture(shared)
    assert own["accounted"] == own["loaded"] == 1 + shared["patched_bytes"]
    assert own["freed"] >= own["loaded"] // 2
    assert own["left"] == own["loaded"] - own["freed"]


def test_another_worker_takes_what_one_has_merged(inside: Inside, start: Any, broker: Any) -> None:
    one = inside("adapted")
    other = start(broker)
    sets = {name for weights in merged_sets(broker) for name in weights["names"]}
    found = other("adapted")
    assert picture(found) == picture(one)
    assert found["views"] == one["views"]
    held = merged_sets(broker)
    assert {name for weights in held for name in weights["names"]} == sets, "it published anew"
    assert any(len(weights["holders"]) == 2 for weights in held)
    other.end()


def test_hooks_write_to_nothing_that_is_shared(inside: Inside) -> None:
    before = inside("plain")
    hooked = inside("hooked")
    assert hooked["latent"] != before["latent"]
    assert hooked["diverged"] == 0
    assert inside("plain") == before


def test_a_decode_waits_for_its_turn(inside: Inside) -> None:
    assert inside("waits")["took"] > 0.8


def test_a_restarted_broker_has_the_same_weights_at_the_same_addresses(start: Any, start_broker: Any) -> None:
    broker = start_broker()
    inside = start(broker)
    before = inside("plain")
    broker.kill()
    assert not inside("again")["held"]
    assert picture(inside("plain")) == picture(before)
    broker.start()
    again = inside("again")
    assert again["held"] and again["same_addresses"]
    assert inside("plain") == before
    with luna_broker.connect(broker.address) as client:
        (weights,) = client.status()["weights"]
    assert len(weights["holders"]) == 1
    inside.end()
