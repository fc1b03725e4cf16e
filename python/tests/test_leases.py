"""A result lives in shared memory for exactly as long as somebody in this process looks at it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from conftest import DEADLINE_S, HAND_OFF, eventually, expected_marks, leases, marks

MAPS = Path("/proc/self/maps")
needs_maps = pytest.mark.skipif(not MAPS.exists(), reason="needs /proc/self/maps (Linux)")


@pytest.fixture
def hand_off(client: Any) -> Any:
    return client.vae(HAND_OFF)


@pytest.fixture
def latent(hand_off: Any) -> torch.Tensor:
    return torch.randn(1, hand_off.info["latent_channels"], 16, 16)


def shared_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that it shares with another one."""
    ranges = []
    for line in MAPS.read_text().splitlines():
        span, permissions = line.split()[:2]
        if permissions.endswith("s"):
            start, end = (int(address, 16) for address in span.split("-"))
            ranges.append((start, end))
    return ranges


def assert_no_leases(client: Any) -> None:
    eventually(lambda: leases(client) == 0, "all leases of the session are released")


@needs_maps
def test_result_lies_in_shared_memory(hand_off: Any, latent: torch.Tensor) -> None:
    image = hand_off.decode(latent)
    last_byte = image.data_ptr() + image.numel() * image.element_size() - 1
    assert any(start <= image.data_ptr() and last_byte < end for start, end in shared_mappings())


def test_result_memory_is_not_torch_s_own(hand_off: Any, latent: torch.Tensor) -> None:
    assert not hand_off.decode(latent).untyped_storage().resizable()


def test_views_share_the_address_of_the_result(hand_off: Any, latent: torch.Tensor) -> None:
    image = hand_off.decode(latent)
    assert image.is_contiguous()
    assert image.contiguous().data_ptr() == image.data_ptr()
    assert image[0].numpy().ctypes.data == image.data_ptr()


def test_results_held_at_once_have_memory_of_their_own(hand_off: Any) -> None:
    channels = hand_off.info["latent_channels"]
    sources = [torch.full((1, channels, 8, 8), float(value)) for value in range(5)]
    images = [hand_off.decode(source) for source in sources]
    assert len({image.data_ptr() for image in images}) == len(images)
    for source, image in zip(sources, images, strict=True):
        assert torch.equal(marks(image), expected_marks(source))


def test_writing_into_a_result_changes_no_other(hand_off: Any, latent: torch.Tensor) -> None:
    first, second = hand_off.decode(latent), hand_off.decode(latent)
    kept = second.clone()
    first.fill_(-1.0)
    assert torch.equal(second, kept)
    assert (first == -1.0).all()


def test_held_result_is_a_lease_and_a_dropped_one_is_none(client: Any, hand_off: Any, latent: torch.Tensor) -> None:
    assert_no_leases(client)
    image = hand_off.decode(latent)
    assert leases(client) >= 1
    del image
    assert_no_leases(client)


def test_numpy_result_releases_its_lease_too(client: Any, hand_off: Any, latent: torch.Tensor) -> None:
    image = hand_off.decode(latent.numpy())
    assert leases(client) >= 1
    del image
    assert_no_leases(client)


def test_shared_input_releases_its_lease(client: Any, hand_off: Any) -> None:
    latent = client.empty((1, hand_off.info["latent_channels"], 8, 8), torch.float32)
    assert leases(client) >= 1
    del latent
    assert_no_leases(client)


def test_view_keeps_the_lease_of_the_whole_result(client: Any, hand_off: Any, latent: torch.Tensor) -> None:
    corner = hand_off.decode(latent)[0, :2, :2]
    gc.collect()
    assert leases(client) >= 1
    kept = corner.clone()
    for _ in range(4):
        hand_off.decode(torch.zeros_like(latent))
    assert torch.equal(corner, kept)
    del corner
    assert_no_leases(client)


def test_result_in_a_reference_cycle_is_released_once_collected(
    client: Any, hand_off: Any, latent: torch.Tensor
) -> None:
    cycle: dict[str, Any] = {"image": hand_off.decode(latent)}
    cycle["self"] = cycle
    del cycle
    gc.collect()
    assert_no_leases(client)


def test_result_may_be_dropped_in_another_thread(client: Any, hand_off: Any, latent: torch.Tensor) -> None:
    held = [hand_off.decode(latent)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(DEADLINE_S)
    assert not held
    assert_no_leases(client)


@needs_maps
def test_steady_use_maps_nothing_new(client: Any, hand_off: Any, latent: torch.Tensor) -> None:
    for _ in range(3):
        hand_off.decode(latent)
    before = set(shared_mappings())
    for _ in range(50):
        hand_off.decode(latent)
    # Mappings of earlier tests' clients may still go while this one runs.
    assert set(shared_mappings()) <= before


def test_view_survives_the_closed_and_collected_client(broker: Any) -> None:
    client = luna_broker.connect(broker.address)
    vae = client.vae(HAND_OFF)
    latent = torch.randn(1, vae.info["latent_channels"], 8, 8)
    image = vae.decode(latent)
    view, array = image[0], image.numpy()
    client.close()
    del client, vae, image
    gc.collect()
    assert torch.equal(marks(view), expected_marks(latent))
    np.testing.assert_array_equal(marks(array), expected_marks(latent).numpy())
    view.add_(1.0)


def test_client_that_goes_away_leaves_no_session(client: Any, broker: Any) -> None:
    other = luna_broker.connect(broker.address, name="short-lived")
    vae = other.vae(HAND_OFF)
    image = vae.decode(torch.randn(1, vae.info["latent_channels"], 8, 8))
    other.close()

    def names() -> list[str]:
        return [session["name"] for session in client.status()["sessions"]]

    eventually(lambda: "short-lived" not in names(), "the session of a closed client ends")
    assert image.shape[-1] == 3


AT_EXIT = """
import sys, threading
import luna_broker, torch

client = luna_broker.connect(sys.argv[1])
vae = client.vae("builtin:hand-off")
latent = client.empty((1, vae.info["latent_channels"], 8, 8), torch.float32)
latent.fill_(0.5)
image = vae.decode(latent)
array = vae.decode(latent.numpy())
view, window = image[0, 1:], memoryview(image.numpy())

class Cycle:
    pass

cycle = Cycle()
cycle.self, cycle.image = cycle, vae.decode(latent)
local = threading.local()
local.image = vae.decode(latent)
torch.kept_until_the_very_end = vae.decode(latent)
"""


@pytest.mark.parametrize("ending", ["", "client.close()", "del client, vae", "sys.exit(0)"])
def test_process_may_end_while_it_holds_results(broker: Any, ending: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AT_EXIT + ending, broker.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
