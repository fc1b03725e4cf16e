"""The steps about SDXL, played on the CPU with a small model of the same make and the real broker.

That a step can be played is shown here, and that it says what is wrong; what it finds on a GPU is not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import device_memory
import luna_broker
import pytest
import report
import sdxl_checkpoint
import sdxl_forward
import sdxl_lora
import sdxl_memory
import torch
import weight_file
from programs import Broker, NotAvailable
from sdxl_scene import Scene
from sdxl_unet import SMALL
from steps import Bench, Unfinished, by_table


def told(output: str) -> list[dict]:
    return [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines()]


def test_a_forward_is_compared_and_timed(played):
    found = played("sdxl")
    ways = [row["way"] for row in found["a forward of two rows"]]
    assert ways[0] == sdxl_forward.EAGER and sdxl_forward.REMOTE in ways and len(ways) == 5
    compared = found["distance to float32 (relative L2)"]
    assert [row["way"] for row in compared] == ways and all(row["is_right"] for row in compared)
    assert found["a forward of two rows"][0]["of eager PyTorch"] == 1


def test_no_time_is_told_of_a_forward_that_computes_something_else(scene: Scene, monkeypatch, capsys):
    given = scene.given()
    right = scene.own_unet()
    wrong = scene.own_unet()
    wrong.middle_block[1].transformer_blocks[0].norm1.eps = 0.01
    ways = {sdxl_forward.EAGER: lambda: right(*given), sdxl_forward.REMOTE: lambda: wrong(*given)}
    monkeypatch.setattr(sdxl_forward, "ways", lambda *_: ways)
    monkeypatch.setattr(sys, "argv", ["", "--broker", scene.broker, "--place", "cpu", "--folder", str(scene.folder)])
    assert sdxl_forward.main() == 1
    rows = by_table(told(capsys.readouterr().out))
    assert [row["is_right"] for row in rows["distance to float32 (relative L2)"]] == [True, False]
    assert "a forward of two rows" not in rows


def test_each_part_has_its_row_of_memory(played):
    found = played("sdxl_memory")
    rows = found["memory by part"]
    of = {row["part"]: row for row in rows}
    assert all(row["is_finite"] and row["most_GB"] >= row["all_GB"] for row in rows) and len(rows) == 13
    # What is loaded is counted where it is loaded, and no longer where it is unloaded.
    counted = [of[part]["weights_as_told_GB"] for part in ("text encoders: loaded", "UNet: loaded", "VAE: loaded")]
    assert 0 < counted[0] < counted[1] < counted[2] and of["VAE: unloaded"]["weights_as_told_GB"] == 0
    assert all(row["tensors_as_told_GB"] > 0 for row in rows)
    assert [row["is_right"] for row in found["distance to the CPU"]] == [True] * 3


def test_text_encoders_and_vaes_that_compute_something_else_are_told(scene: Scene, capsys):
    class Wrong:
        """Prompts come out right and pictures do not."""

        def __init__(self, right: luna_broker.Client) -> None:
            self.clip, self._right = right.clip, right

        def vae(self, name: str) -> Wrong:
            self._vae = self._right.vae(name)
            return self

        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            return self._vae.decode(latent.flip(2))

    scene.write_text()
    scene.write_vae()
    with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder)) as broker:
        assert not sdxl_memory.as_on_the_cpu(scene, Wrong(luna_broker.connect(broker.socket, timeout=20)))
    rows = by_table(told(capsys.readouterr().out))["distance to the CPU"]
    assert [row["is_right"] for row in rows] == [True, True, False]


def test_the_peak_is_more_than_what_is_there_afterwards(monkeypatch):
    amounts = iter([1, 1, 5])
    monkeypatch.setattr(device_memory, "taken", lambda *_: next(amounts, 2))
    with device_memory.Peak("cpu") as peak:
        peak._is_over.wait(0.05)
    assert peak.bytes == 5


def test_adapters_and_the_cache_are_compared_and_timed(played):
    found = played("sdxl_lora")
    assert {row["unknown_keys"] for row in found["adapters put together"]} == {0}
    # Query, key, value and what comes after them, of two kinds of attention, in each of the small model's four blocks.
    assert found["adapters put together"][0]["layers"] == 32
    compared = found["distance to float32 with merged weights"]
    assert len(compared) == 7 and all(row["is_right"] for row in compared)
    assert [row["way"] for row in found["adapters of all linear layers of attention"]][0] == sdxl_lora.NONE
    computed, left_out = found["first-block cache"]
    assert left_out["of computed"] < 1 == computed["of computed"]


def test_an_adapter_that_is_left_out_or_does_nothing_is_no_success(scene: Scene, capsys):
    given, unet, path = scene.given(), scene.own_unet(), scene.write_adapter(16, 11)
    found = {name: ([(str(path), sdxl_lora.STRENGTH)], "side") for name in (sdxl_lora.SIDE, sdxl_lora.MERGED)}

    class LeavesOut:
        def __call__(self, *given, loras=(), lora_mode="side"):
            return unet(*given)

    class TakesUp:
        def __call__(self, *given, loras=(), lora_mode="side"):
            own = scene.own_unet()
            if loras:
                sdxl_lora.merge(own, str(path), sdxl_lora.STRENGTH, "cpu")
            return own(*given)

    assert not sdxl_lora.numerics(scene, LeavesOut(), found, given)
    assert sdxl_lora.numerics(scene, TakesUp(), found, given)
    nothing = scene.folder / "nothing.safetensors"
    weight_file.write(nothing, sdxl_checkpoint.adapter_shapes(SMALL, 16), lambda _, shape: torch.zeros(shape))
    found = {name: ([(str(nothing), 1.0)], "side") for name in found}
    assert not sdxl_lora.numerics(scene, LeavesOut(), found, given)
    assert capsys.readouterr().out.count("is_right") == 6


def test_requests_together_have_their_tables(played):
    found = played("sdxl_batches")
    rows = [(row["latent"], row["rows"]) for row in found["rows in one request"]]
    assert rows == [(side, rows) for side in (4, 8) for rows in (2, 4, 8, 16)]
    assert all(row["is_right"] for row in found["rows in one request"])
    several = found["clients at once"]
    assert len(several) == 12 and all(row["is_right"] for row in several)
    assert {row["together"] for row in several if row["broker_runs"] == "one at a time"} == {1}
    (told,) = [part["found_by_the_broker"] for part in found["parts"] if part.get("found_by_the_broker")]
    assert "rows=2 height=8 width=8" in "".join(told)


def test_compiling_is_timed_beside_eager(played):
    found = played("sdxl_compile")
    assert [row["way"] for row in found["torch.compile"]] == [
        "eager PyTorch",
        "blocks of attention compiled",
        "eager PyTorch",
        "compiled whole",
    ]
    assert all(part["is_right"] for part in found["parts"] if "is_right" in part)


def test_what_cannot_be_compiled_is_a_finding_and_no_failure(bench: Bench, played, monkeypatch):
    seen: list[dict] = []
    monkeypatch.setattr(bench, "tell", seen.append)
    parts = [{"part": "compiled whole", "left_out": "InvalidCxxCompiler: No working C++ compiler found"}]

    def nothing(*_words, **_settings):
        return {"parts": parts}

    def too_slow(*_words, **_settings):
        raise Unfinished("timed out", {"parts": []})

    def half(*_words, **_settings):
        raise Unfinished("timed out", {"torch.compile": [{"way": "blocks"}], "parts": []})

    def broken(*_words, **_settings):
        raise Unfinished("failed", {"parts": []})

    monkeypatch.setattr(bench, "torch", nothing)
    with pytest.raises(NotAvailable, match="No working C\\+\\+ compiler"):
        played("sdxl_compile")
    assert seen == [{"parts": parts}]
    monkeypatch.setattr(bench, "torch", too_slow)
    with pytest.raises(NotAvailable, match="the time of the step was over"):
        played("sdxl_compile")
    monkeypatch.setattr(bench, "torch", half)
    assert "left_out" in played("sdxl_compile")
    monkeypatch.setattr(bench, "torch", broken)
    with pytest.raises(Unfinished, match="failed"):
        played("sdxl_compile")


def test_rows_stand_under_the_names_of_their_tables():
    found = by_table([{"part": "weights", "GB": 5.1}, {"table": "workers", "kind": "a", "GB": 1.5}, {"part": "end"}])
    assert found == {"workers": [{"kind": "a", "GB": 1.5}], "parts": [{"part": "weights", "GB": 5.1}, {"part": "end"}]}
    steps = [{"name": "s", "title": "A step", "outcome": "passed", "seconds": 1.0, "result": found}]
    page = report.page({"name": "x", "commit": "c0ffee", "steps": steps})
    assert "workers:\n\n| kind | GB |\n| --- | --- |\n| a | 1.5 |\n" in page
