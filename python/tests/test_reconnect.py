"""A broker that goes away is noticed at once, and one that comes back is simply used again."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import DEADLINE_S, HAND_OFF, expected_marks, hold_still, marks

# What a worker may lose to a broker that died.
LOSS_NOTICED_S = 1.0


def latent_for(vae: Any) -> torch.Tensor:
    return torch.randn(1, vae.info["latent_channels"], 8, 8)


def test_nobody_listening_is_a_lost_connection(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(luna_broker.ConnectionLost) as raised:
        luna_broker.connect(str(tmp_path / "nobody.sock"))
    assert time.monotonic() - started < LOSS_NOTICED_S
    assert raised.value.remedy


def test_killed_broker_is_a_lost_connection_within_a_second(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        vae.decode(latent)
        broker.kill()
        started = time.monotonic()
        with pytest.raises(luna_broker.ConnectionLost):
            vae.decode(latent)
        assert time.monotonic() - started < LOSS_NOTICED_S


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to hold a broker still")
def test_call_in_flight_learns_of_the_loss_within_a_second(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        called = threading.Event()
        noticed: list[tuple[type, float]] = []

        def call() -> None:
            called.set()
            try:
                vae.decode(latent)
            except luna_broker.LunaBrokerError as error:
                noticed.append((type(error), time.monotonic()))

        hold_still(broker.pid)
        thread = threading.Thread(target=call)
        thread.start()
        assert called.wait(DEADLINE_S)
        broker.kill()
        killed = time.monotonic()
        thread.join(DEADLINE_S)
        (kind, when) = noticed[0]
        assert kind is luna_broker.ConnectionLost
        assert when - killed < LOSS_NOTICED_S


def test_next_call_finds_the_restarted_broker(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        vae.decode(latent)
        for _ in range(3):
            broker.kill()
            broker.start()
            assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))
            assert client.ping() >= 0


def test_client_recovers_even_if_it_saw_the_loss(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        broker.kill()
        for _ in range(2):
            with pytest.raises(luna_broker.ConnectionLost):
                vae.decode(latent)
        broker.start()
        assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))


def test_result_outlives_the_broker_that_made_it(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        image = vae.decode(latent)
        broker.kill()
        assert torch.equal(marks(image), expected_marks(latent))
        broker.start()
        again = vae.decode(latent)
        assert torch.equal(marks(image), expected_marks(latent))
        del image
        assert torch.equal(marks(again), expected_marks(latent))


def test_shared_input_from_before_a_restart_still_arrives(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = client.empty((1, vae.info["latent_channels"], 8, 8), torch.float32)
        latent.copy_(torch.randn(latent.shape))
        vae.decode(latent)
        broker.kill()
        broker.start()
        assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))


def test_terminated_broker_ends_in_order_and_says_so(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        assert broker.stop() == 0
        with pytest.raises((luna_broker.ConnectionLost, luna_broker.ShuttingDown)):
            vae.decode(latent_for(vae))


def test_closed_client_stays_closed(start_broker: Any) -> None:
    broker = start_broker()
    client = luna_broker.connect(broker.address)
    vae = client.vae(HAND_OFF)
    client.close()
    client.close()
    with pytest.raises(luna_broker.ConnectionLost):
        vae.decode(latent_for(vae))


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to hold a broker still")
def test_silent_broker_is_a_timeout_and_the_client_recovers(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address, timeout=1.0) as client:
        hold_still(broker.pid)
        with pytest.raises(luna_broker.Timeout):
            client.ping()
        os.kill(broker.pid, signal.SIGCONT)
        vae = client.vae(HAND_OFF)
        latent = latent_for(vae)
        assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))
