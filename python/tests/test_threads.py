"""One client, many threads; and Python goes on while a call waits for the broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import DEADLINE_S, HAND_OFF, eventually, expected_marks, hold_still, leases, marks

THREADS = 8
CALLS_PER_THREAD = 40

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to hold a broker still")


def in_threads(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, number) for number in range(THREADS)]:
            done.result()


def test_every_thread_gets_its_own_results(client: Any) -> None:
    vae = client.vae(HAND_OFF)
    channels = vae.info["latent_channels"]
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        together.wait(DEADLINE_S)
        for call in range(CALLS_PER_THREAD):
            side = 4 + (number + call) % 7
            latent = torch.randn(1, channels, side, side, generator=generator)
            assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))

    in_threads(work)
    eventually(lambda: leases(client) == 0, "all leases of the session are released")


def test_kinds_of_calls_mix_across_threads(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    image = torch.rand(1, 32, 40, 3)
    latent = vae.encode(image).clone()
    decoded = vae.decode(latent).clone()
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        mine = client.vae(constructed_vae)
        together.wait(DEADLINE_S)
        for call in range(6):
            kind = (number + call) % 3
            if kind == 0:
                assert torch.equal(mine.encode(image), latent)
            elif kind == 1:
                assert torch.equal(mine.decode(latent), decoded)
            else:
                assert client.ping() >= 0

    in_threads(work)


def test_one_thread_s_error_is_not_another_s(client: Any) -> None:
    vae = client.vae(HAND_OFF)
    channels = vae.info["latent_channels"]
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        latent = torch.full((1, channels, 4, 4), float(number))
        together.wait(DEADLINE_S)
        for _ in range(CALLS_PER_THREAD):
            if number % 2 == 0:
                assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))
            else:
                with pytest.raises(luna_broker.InvalidTensor):
                    vae.decode(latent[0])

    in_threads(work)


# Should the call hold the interpreter, nothing in this process could wake the broker again.
RESCUE = """
import os, pathlib, signal, sys, threading
threading.Event().wait(float(sys.argv[3]))
pathlib.Path(sys.argv[2]).touch()
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


@needs_signals
def test_waiting_for_the_broker_does_not_hold_the_interpreter(start_broker: Any, tmp_path: Path) -> None:
    broker = start_broker()
    rescued = tmp_path / "rescued"
    called, returned = threading.Event(), threading.Event()
    with luna_broker.connect(broker.address) as client:
        vae = client.vae(HAND_OFF)
        latent = torch.randn(1, vae.info["latent_channels"], 8, 8)
        results = []

        def call() -> None:
            called.set()
            results.append(vae.decode(latent))
            returned.set()

        hold_still(broker.pid)
        rescuer = subprocess.Popen([sys.executable, "-c", RESCUE, str(broker.pid), str(rescued), "8"])
        try:
            thread = threading.Thread(target=call)
            thread.start()
            assert called.wait(DEADLINE_S)
            # Long enough for the thread to be inside its call, whose answer cannot come yet.
            assert not returned.wait(0.2)
            assert not rescued.exists(), "Python stood still until the broker was woken from outside"
            os.kill(broker.pid, signal.SIGCONT)
            assert returned.wait(DEADLINE_S)
            thread.join(DEADLINE_S)
        finally:
            rescuer.kill()
            rescuer.wait()
        assert torch.equal(marks(results[0]), expected_marks(latent))


def test_closing_a_client_while_threads_use_it_gives_results_or_typed_errors(broker: Any) -> None:
    client = luna_broker.connect(broker.address)
    vae = client.vae(HAND_OFF)
    latent = torch.randn(1, vae.info["latent_channels"], 8, 8)
    under_way = threading.Barrier(THREADS + 1)

    def work() -> None:
        vae.decode(latent)
        under_way.wait(DEADLINE_S)
        try:
            for _ in range(CALLS_PER_THREAD):
                assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))
        except luna_broker.LunaBrokerError:
            return

    with ThreadPoolExecutor(THREADS) as pool:
        workers = [pool.submit(work) for _ in range(THREADS)]
        under_way.wait(DEADLINE_S)
        client.close()
        for done in workers:
            done.result(DEADLINE_S)
