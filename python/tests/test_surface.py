"""What a client can ask of a broker besides work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import DEADLINE_S, HAND_OFF


def test_everything_promised_is_exported() -> None:
    assert len(set(luna_broker.__all__)) == len(luna_broker.__all__)
    for name in luna_broker.__all__:
        assert hasattr(luna_broker, name)
    assert luna_broker.__version__


def test_session_tells_name_version_and_why_each_rung_was_chosen(broker: Any) -> None:
    with luna_broker.connect(broker.address, name="a name with spaces, ü") as client:
        assert client.session.name == "a name with spaces, ü"
        assert client.session.broker_version
        assert client.session.rungs
        for rung in client.session.rungs:
            assert rung.device
            assert rung.rung
            assert rung.reason


def test_cpu_tensors_of_one_machine_cross_in_shared_memory(client: Any) -> None:
    assert [rung.rung for rung in client.session.rungs if rung.device == "cpu"] == ["shm"]


def test_address_comes_from_the_environment_if_none_is_given(broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNA_BROKER", broker.address)
    with luna_broker.connect() as client:
        assert client.ping() >= 0


def test_sessions_are_listed_by_name(broker: Any, client: Any) -> None:
    with luna_broker.connect(broker.address, name="other"):
        names = [session["name"] for session in client.status()["sessions"]]
        assert {"other", client.session.name} <= set(names)


def test_metrics_count_sessions_by_the_rung_in_use_and_why(client: Any) -> None:
    lines = client.metrics().splitlines()
    assert lines[-1] == "# EOF"
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    in_use = 'luna_broker_sessions{device="cpu",rung="shm",reason="sealed_memory_probed"}'
    assert int(samples[in_use]) >= 1
    answered = int(samples["luna_broker_requests_total"])
    client.ping()
    later = dict(line.rsplit(" ", 1) for line in client.metrics().splitlines() if not line.startswith("#"))
    assert int(later["luna_broker_requests_total"]) >= answered + 2


def test_ping_is_a_duration_in_seconds(client: Any) -> None:
    took_s = client.ping()
    assert isinstance(took_s, float)
    assert 0 < took_s < 5


def test_leaving_the_block_closes_the_client(broker: Any) -> None:
    with luna_broker.connect(broker.address) as client:
        client.ping()
    with pytest.raises(luna_broker.ConnectionLost):
        client.ping()


def test_models_are_listed_by_name(client: Any, constructed_vae: str) -> None:
    names = [model["name"] for model in client.models()]
    assert HAND_OFF in names
    assert any("constructed" in name for name in names)


def test_unloaded_model_is_loaded_again_by_the_next_call(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    latent = torch.randn(1, 4, 4, 4)
    before = vae.decode(latent).clone()
    client.unload(constructed_vae)
    assert torch.equal(vae.decode(latent), before)
    client.unload(constructed_vae)
    client.load(constructed_vae)
    assert torch.equal(client.vae(constructed_vae).decode(latent), before)


def test_unknown_model_can_be_neither_loaded_nor_unloaded(client: Any) -> None:
    with pytest.raises(luna_broker.ModelNotFound):
        client.load("no-such-model")
    with pytest.raises(luna_broker.ModelNotFound):
        client.unload("no-such-model")


def test_empty_tensor_has_the_shape_and_type_asked_for_and_is_writable(client: Any) -> None:
    tensor = client.empty((2, 3, 5), torch.float16)
    assert tensor.shape == (2, 3, 5)
    assert tensor.dtype == torch.float16
    tensor.fill_(1.5)
    assert (tensor == 1.5).all()


def test_two_clients_of_one_process_are_two_sessions(broker: Any) -> None:
    with luna_broker.connect(broker.address, name="one") as one:
        two = luna_broker.connect(broker.address, name="two")
        two.close()
        vae = one.vae(HAND_OFF)
        vae.decode(torch.randn(1, vae.info["latent_channels"], 4, 4))


def test_objects_name_themselves(client: Any) -> None:
    assert client.session.name in repr(client)
    assert HAND_OFF in repr(client.vae(HAND_OFF))


def test_the_example_runs_against_a_broker(broker: Any, constructed_vae: str) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "decode.py"
    command = [sys.executable, str(example), "--socket", broker.address, "--vae", constructed_vae]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stderr
    assert "image [1, 256, 384, 3]" in ran.stdout


def test_a_device_other_than_the_cpu_is_refused_by_name(client: Any) -> None:
    vae = client.vae(HAND_OFF)
    latent = torch.zeros(1, 4, 8, 8)
    assert vae.decode(latent, device="cpu").device.type == "cpu"
    with pytest.raises(luna_broker.Unsupported, match="CUDA driver|cuda:7"):
        vae.decode(latent, device="cuda:7")


def test_a_small_budget_runs_in_tiles_and_says_so(start_broker: Any, constructed_vae: str) -> None:
    broker = start_broker("--vae", constructed_vae, "--vae-budget", "512M")
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(constructed_vae)
        whole = vae.decode(torch.rand(1, 4, 32, 32))
        assert vae.last.mode == "full"
        tiled = vae.decode(torch.rand(1, 4, 160, 160))
        assert vae.last.mode == "tiled"
        assert (whole.shape, tiled.shape) == ((1, 256, 256, 3), (1, 1280, 1280, 3))
