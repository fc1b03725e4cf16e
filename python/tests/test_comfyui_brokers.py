"""Connections of a ComfyUI process: one for each address, and whether a broker is still the same. Needs no ComfyUI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luna_broker
import pytest
from luna_broker.comfyui import brokers


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test's connections are another's."""
    yield
    for client in brokers._CLIENTS.values():
        client.close()
    brokers._CLIENTS.clear()


def test_an_address_has_one_client(broker: Any) -> None:
    client = brokers.client(broker.address)
    assert brokers.client(f" {broker.address} ") is client
    assert client.session.name == f"comfyui-{os.getpid()}"


def test_questions_have_a_client_of_their_own(broker: Any) -> None:
    assert brokers.quick(broker.address) is brokers.quick(broker.address)
    assert brokers.quick(broker.address) is not brokers.client(broker.address)
    assert brokers.quick(broker.address).session.name != brokers.client(broker.address).session.name


def test_the_default_is_the_environments(broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNA_BROKER", broker.address)
    assert brokers.client().status()["address"] == broker.address


def test_nobody_there_is_an_error_and_another_time_not(start_broker: Any) -> None:
    broker = start_broker()
    broker.kill()
    with pytest.raises(luna_broker.ConnectionLost):
        brokers.client(broker.address)
    broker.start()
    assert brokers.client(broker.address).ping() > 0


def test_a_generation_is_the_brokers_life(start_broker: Any) -> None:
    broker = start_broker()
    first = brokers.generation(broker.address)
    assert first == brokers.generation(broker.address) != brokers.ABSENT
    broker.kill()
    assert brokers.generation(broker.address) == brokers.ABSENT
    broker.start()
    assert brokers.generation(broker.address) not in (first, brokers.ABSENT)


def test_a_process_number_that_comes_again_is_another_generation(start_broker: Any) -> None:
    """In a container a broker may have the same number in each of its lives."""
    broker = start_broker()
    now = brokers.generation(broker.address)
    (key,) = [key for key in brokers._STARTS if key[0] == broker.address]
    # As if the number had been another broker's, an hour ago.
    earlier = brokers._STARTS[key] = brokers._STARTS[key] - 3600
    assert brokers.generation(broker.address) == brokers.generation(broker.address)
    assert not brokers.generation(broker.address).endswith(f"@{earlier:.3f}")
    assert brokers._STARTS[key] == pytest.approx(float(now.rpartition("@")[2]), abs=brokers.START_TOLERANCE_S)


@pytest.mark.parametrize("address", ["vae=/nowhere", "x" * 500, "vae=,unet=", "vae=/a,video=/b"])
def test_no_address_makes_a_generation_fail(address: str) -> None:
    assert brokers.generation(address) == brokers.ABSENT


def test_services_may_have_brokers_of_their_own(start_broker: Any, broker: Any) -> None:
    other = start_broker()
    address = f"unet={broker.address},vae={other.address}"
    assert brokers.split(address) == {"unet": broker.address, "vae": other.address}
    both = brokers.generation(address)
    assert broker.address in both and other.address in both
    other.kill()
    assert brokers.generation(address) == brokers.ABSENT
    other.start()
    assert brokers.generation(address) not in (both, brokers.ABSENT)


def test_one_broker_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNA_BROKER", raising=False)
    assert brokers.split("") == {} == brokers.split(str(tmp_path / "vae=x.sock"))


def test_a_service_that_there_is_not_is_named() -> None:
    with pytest.raises(luna_broker.ConfigurationError, match="video"):
        brokers.split("vae=/a,video=/b")
