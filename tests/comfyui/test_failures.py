"""A broker that goes away, a broker that is not there, and a user who changes their mind."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest
from compare import assert_equal, assert_near
from conftest import ARITHMETIC
from graphs import Loaders
from workers import StartComfyUI
from workflows import txt2img

import broker as brokers

# Long enough to be killed in the middle of it.
LONG = partial(txt2img, checkpoint="wide.safetensors", steps=24, scheduler="karras", width=128, height=128)
SHORT = partial(txt2img, seed=11)
# Between asking for the interruption and its effect, on a machine under load.
INTERRUPTION_DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def alone(comfyui: StartComfyUI):
    """A ComfyUI with the pack for tests that end its broker."""
    return comfyui("alone", True, *ARITHMETIC["remote"])


@pytest.fixture
def reference(side):
    return side("remote").reference


def second_step(message) -> bool:
    return message["type"] == "progress" and message["data"]["value"] >= 2


def test_broker_killed_while_sampling_remote_is_a_clean_error(alone, start_broker, reference):
    broker = start_broker()
    loaders = Loaders("remote", broker.address, on_failure="error")
    prompt = alone.queue(LONG(loaders))
    alone.wait_for(prompt, second_step)
    broker.kill()
    result = alone.wait(prompt)
    assert result.error is not None, "the workflow ended as if nothing had happened"
    assert result.error["node_type"] == "KSampler"
    assert "broker" in result.error["exception_message"]

    broker.start()
    assert_near(alone.run(SHORT(loaders)).ok(), reference(SHORT))
    assert brokers.completed(broker)["unet"] > 0


def test_broker_killed_while_sampling_remote_may_be_finished_locally(alone, start_broker, reference):
    broker = start_broker()
    loaders = Loaders("remote", broker.address, on_failure="local")
    prompt = alone.queue(LONG(loaders))
    alone.wait_for(prompt, second_step)
    broker.kill()
    result = alone.wait(prompt).ok()
    assert_near(result, reference(LONG))
    assert "local" in result.text, f"nothing told the user: {result.text!r}"

    broker.start()
    assert_near(alone.run(SHORT(loaders)).ok(), reference(SHORT))
    assert brokers.completed(broker)["unet"] > 0, "the broker is back and was not asked again"


def test_broker_killed_while_sampling_attached_changes_nothing(alone, start_broker, reference):
    broker = start_broker()
    loaders = Loaders("attached", broker.address, on_failure="local")
    prompt = alone.queue(LONG(loaders))
    alone.wait_for(prompt, second_step)
    broker.kill()
    assert_equal(alone.wait(prompt).ok(), reference(LONG))

    broker.start()
    assert_equal(alone.run(SHORT(loaders)).ok(), reference(SHORT))
    assert brokers.holds_weights(broker, alone.pid), "the broker is back and was not asked again"


@pytest.mark.parametrize("mode", ["attached", "remote"])
def test_an_absent_broker_is_a_clean_error(mode, alone, scratch):
    nobody = str(scratch / "nobody.sock")
    result = alone.run(SHORT(Loaders(mode, nobody, on_failure="error")))
    assert result.error is not None
    assert result.error["node_type"] == "LunaBrokerCheckpointLoader"
    assert nobody in result.error["exception_message"]


@pytest.mark.parametrize("mode", ["auto", "attached", "remote"])
def test_without_a_broker_workflows_run_locally_and_say_so(mode, alone, scratch, reference):
    nobody = str(scratch / "nobody.sock")
    result = alone.run(SHORT(Loaders(mode, nobody, on_failure="local"))).ok()
    assert_equal(result, reference(SHORT))
    assert "local" in result.text and nobody in result.text, f"nothing told the user: {result.text!r}"


def test_a_broker_that_was_absent_is_asked_at_the_next_prompt(alone, start_broker, reference):
    broker = start_broker()
    loaders = Loaders("remote", broker.address, on_failure="local")
    broker.kill()
    alone.run(SHORT(loaders)).ok()
    broker.start()
    assert_near(alone.run(SHORT(loaders)).ok(), reference(SHORT))
    assert brokers.completed(broker)["unet"] > 0, "the loader was not tried again"


def test_interrupting_takes_a_waiting_request_back(alone, start_broker, reference):
    broker = start_broker()
    loaders = Loaders("remote", broker.address)
    prompt = alone.queue(LONG(loaders))
    alone.wait_for(prompt, second_step)
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        alone.interrupt()
        result = alone.wait(prompt)
        took = time.monotonic() - began
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    assert result.interrupted, f"the workflow went on: {result.messages[-3:]}"
    assert took < INTERRUPTION_DEADLINE_S, f"only after {took:.1f} s"
    assert_near(alone.run(SHORT(loaders)).ok(), reference(SHORT))
