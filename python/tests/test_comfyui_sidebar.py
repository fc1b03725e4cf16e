"""What the sidebar and the node Broker Status are told of brokers. Needs no ComfyUI."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from typing import Any

import luna_broker
import pytest
import torch
from conftest import StartBroker, eventually, hold_still
from luna_broker.comfyui import brokers, server
from luna_broker.comfyui.overview import as_text, reason, size, summary

WORKER = f"comfyui-{os.getpid()}"


@pytest.fixture
def own_broker(start_broker: StartBroker) -> Any:
    broker = start_broker()
    brokers.name(broker.address)
    return broker


def of(address: str) -> dict[str, Any]:
    (broker,) = server.overviews(address)
    return broker


def completed(address: str) -> dict[str, int]:
    return {lane["service"]: lane["completed"] for lane in of(address)["lanes"]}


def test_weights_and_what_they_save_are_told(own_broker: Any) -> None:
    tensors = {"a": torch.zeros(500, 1000), "b": torch.zeros(500, 1000)}
    with (
        luna_broker.connect(own_broker.address, name=WORKER) as one,
        luna_broker.connect(own_broker.address, name="comfyui-2") as two,
    ):
        published = one.publish("style at 0.8", tensors)
        attached = two.attach("style at 0.8")
        broker = of(own_broker.address)
        text = as_text([broker])
        del published, attached
    (weights,) = broker["weights"]
    assert weights["name"] == "style at 0.8"
    assert weights["bytes"] == weights["saved_bytes"] == broker["saved_bytes"] == 4_000_000
    assert sorted(weights["holders"]) == sorted([WORKER, "comfyui-2"])
    assert broker["bytes"] >= 4_000_000
    assert "4.0 MB held once, 4.0 MB saved" in text
    assert summary([broker, broker]).splitlines() == ["4.0 MB held once, 4.0 MB saved, 0 waiting"] * 2
    assert f"session {WORKER} (this ComfyUI): cpu by shm, sealed memory passed the probe" in text
    assert "session comfyui-2: cpu" in text


def test_a_session_is_told_as_ones_own_and_the_question_is_no_session(own_broker: Any) -> None:
    with (
        luna_broker.connect(own_broker.address, name=WORKER),
        luna_broker.connect(own_broker.address, name=f"{WORKER}1"),
    ):
        sessions = {session["name"]: session["is_own"] for session in of(own_broker.address)["sessions"]}
    assert sessions == {WORKER: True, f"{WORKER}1": False}


def test_a_lane_that_is_held_by_a_permit_says_by_whom(own_broker: Any) -> None:
    with luna_broker.connect(own_broker.address, name="comfyui-2") as other, other.permit("vae"):
        lanes = {lane["service"]: lane for lane in of(own_broker.address)["lanes"]}
        assert lanes["vae"]["permitted"] == "comfyui-2"
        assert lanes["unet"]["permitted"] is None
        assert "vae on cpu: held by comfyui-2" in as_text(server.overviews(own_broker.address))


def test_memory_that_a_model_shared_by_several_saves_is_a_copy_for_each_but_the_first(
    own_broker: Any, constructed_vae: str
) -> None:
    with luna_broker.connect(own_broker.address) as one, luna_broker.connect(own_broker.address) as two:
        for worker in (one, two):
            worker.vae(constructed_vae).encode(torch.zeros(1, 16, 16, 3))
        # A reply leaves before its lane counts it.
        eventually(lambda: completed(own_broker.address)["vae"] == 2, "the lane has counted both")
        assert completed(own_broker.address) == {"vae": 2, "unet": 0, "clip": 0}
        told = of(own_broker.address)
    (model,) = told["models"]
    assert (model["family"], model["users"]) == ("taesd", 2)
    assert model["bytes"] > 0
    assert told["saved_bytes"] == model["saved_bytes"] == model["bytes"]


def test_models_that_a_worker_has_loaded_itself_are_listed_and_not_counted(own_broker: Any) -> None:
    with luna_broker.connect(own_broker.address, name=WORKER) as worker:
        worker.register("big.safetensors", {"service": "unet", "bytes": 9_000_000_000})
        told = of(own_broker.address)
    (model,) = (model for model in told["models"] if not model["is_the_brokers"])
    assert (model["name"], model["bytes"]) == ("big.safetensors", 9_000_000_000)
    assert told["bytes"] < 9_000_000_000
    assert told["saved_bytes"] == 0
    assert "big.safetensors: 9.0 GB on" in as_text([told])


def test_a_broker_for_each_service_is_told_once(start_broker: StartBroker) -> None:
    vae = start_broker("--services", "vae")
    other = start_broker("--services", "unet,clip")
    told = server.overviews(f"vae={vae.address},unet={other.address},clip={other.address}")
    assert sorted(broker["address"] for broker in told) == sorted([vae.address, other.address])
    assert [broker["address"] for broker in server.overviews(f"vae={vae.address}")] == [vae.address]


def test_an_answer_can_be_sent(own_broker: Any) -> None:
    answer = server.look(own_broker.address)
    assert json.loads(json.dumps(answer)) == answer
    assert "error" not in answer


def test_a_broker_that_is_not_there_is_an_answer_with_a_remedy(tmp_path: Any) -> None:
    answer = server.look(str(tmp_path / "nobody.sock"))
    assert answer["brokers"] == []
    assert answer["error"]["kind"] == "ConnectionLost"
    assert "luna-broker serve" in answer["error"]["remedy"]
    assert answer["error"]["remedy"] not in answer["error"]["message"]
    assert "nobody.sock" in answer["error"]["message"]


def test_a_broker_that_hangs_holds_up_neither_the_loop_nor_further_questions(
    own_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "QUICK_TIMEOUT_S", 0.5)
    looks: list[str] = []

    def look(address: str, really: Any = server.look) -> dict[str, Any]:
        looks.append(address)
        return dict(really(address))

    monkeypatch.setattr(server, "look", look)
    hold_still(own_broker.pid)
    try:
        answers, ticks = asyncio.run(_ask_three_times(own_broker.address))
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    assert [answer["error"]["kind"] for answer in answers] == ["Timeout"] * 3
    assert all(answer["error"]["remedy"] for answer in answers)
    assert looks == [own_broker.address]
    assert ticks >= 10


async def _ask_three_times(address: str) -> tuple[list[dict[str, Any]], int]:
    """The answers to the same question asked three times at once, and how often the loop turned meanwhile."""
    asked = server.Questions()
    answers = asyncio.gather(*(asked.ask(address) for _ in range(3)))
    ticks = 0
    while not answers.done():
        await asyncio.sleep(0.01)
        ticks += 1
    return list(await answers), ticks


def test_a_question_is_asked_anew_once_it_was_answered(own_broker: Any) -> None:
    async def twice() -> list[dict[str, Any]]:
        asked = server.Questions()
        return [await asked.ask(own_broker.address), await asked.ask(own_broker.address)]

    first, second = asyncio.run(twice())
    assert second["brokers"][0]["requests"] > first["brokers"][0]["requests"]


def test_who_goes_away_takes_the_answer_from_nobody(own_broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def look(_address: str) -> dict[str, Any]:
        assert go_on.wait(10)
        return {"brokers": []}

    monkeypatch.setattr(server, "look", look)

    async def one_leaves() -> dict[str, Any]:
        asked = server.Questions()
        leaves = asyncio.ensure_future(asked.ask(own_broker.address))
        stays = asyncio.ensure_future(asked.ask(own_broker.address))
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.sleep(0)
        go_on.set()
        return await stays

    assert asyncio.run(one_leaves()) == {"brokers": []}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("sealed_memory_probed", "sealed memory passed the probe"),
        ("of_a_later_version", "of_a_later_version"),
        ({"no_shared_gpu": "it has none"}, "no GPU memory is shared: it has none"),
        (
            {"failed": [{"rung": "cuda-ipc", "code": "open", "detail": "error 201"}]},
            "better rungs failed: cuda-ipc (open: error 201)",
        ),
    ],
)
def test_a_rungs_reason_is_a_sentence(told: Any, sentence: str) -> None:
    assert reason(told) == sentence


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (3_438_000_000, "3.4 GB"), (5e16, "50000.0 TB")]
)
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_a_page_may_ask_only_for_brokers_that_nodes_were_given(own_broker: Any) -> None:
    async def ask(address: str) -> dict[str, Any]:
        return await server.Questions().ask(address)

    assert len(asyncio.run(ask(own_broker.address))["brokers"]) == 1
    # Another spelling of the same socket would be another session.
    refused = asyncio.run(ask(f"/{own_broker.address}"))
    assert (refused["brokers"], refused["error"]["kind"]) == ([], "Refused")
    assert "loader" in refused["error"]["remedy"]
