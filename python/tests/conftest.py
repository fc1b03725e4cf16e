"""What the tests share: a broker, more brokers on demand, and the checkpoint they are given."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))

# Beside the repository rather than in it; must be set before the first property test is run.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "luna-hypothesis"))

BINARY_VARIABLE = "LUNA_BROKER_BIN"
HAND_OFF = "builtin:hand-off"

# Long enough for a machine under load; only a failing test waits for it.
DEADLINE_S = 20.0
POLL_PAUSE_S = 0.01

StartBroker = Callable[..., Any]


@pytest.fixture(scope="session")
def binary() -> Path:
    named = os.environ.get(BINARY_VARIABLE)
    if not named:
        pytest.skip(f"{BINARY_VARIABLE} is not set: it names the luna-broker binary to test with")
    path = Path(named).resolve()
    if not path.is_file():
        pytest.fail(f"{BINARY_VARIABLE} names {path}, which is not a file")
    return path


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    # Not pytest's folder: a socket's path must stay below about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="luna-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def constructed_state() -> dict[str, torch.Tensor]:
    from constructed import checkpoint

    return checkpoint()


@pytest.fixture(scope="session")
def constructed_vae(scratch: Path) -> str:
    from constructed import write_checkpoint

    return str(write_checkpoint(scratch / "constructed.safetensors"))


@pytest.fixture(scope="session")
def broker(binary: Path, scratch: Path, constructed_vae: str) -> Iterator[Any]:
    """A broker for all tests that leave it as they found it."""
    from broker_process import BrokerProcess

    options = ["--device", "cpu", "--bench-models", "--vae", constructed_vae]
    with BrokerProcess(binary, scratch / "shared.sock", options) as process:
        yield process


@pytest.fixture
def start_broker(binary: Path) -> Iterator[StartBroker]:
    """Starts brokers of the test's own: `start_broker("--vae-budget", "1000000")`."""
    from broker_process import BrokerProcess

    started: list[BrokerProcess] = []
    with tempfile.TemporaryDirectory(prefix="luna-") as folder:

        def start(*options: str) -> BrokerProcess:
            socket = Path(folder) / f"{len(started)}.sock"
            process = BrokerProcess(binary, socket, ["--device", "cpu", "--bench-models", *options])
            started.append(process)
            return process.start()

        yield start
        for process in started:
            process.kill()


@pytest.fixture
def client(broker: Any) -> Iterator[Any]:
    import luna_broker

    with luna_broker.connect(broker.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def lasting_client(broker: Any) -> Iterator[Any]:
    """One client for all examples of a property test."""
    import luna_broker

    with luna_broker.connect(broker.address) as connected:
        yield connected


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Asks again until `holds`; fails, naming `what`, once the deadline has passed."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(POLL_PAUSE_S)


def hold_still(pid: int) -> None:
    """Stops a process until SIGCONT. A thread on another core may still work after the signal was sent."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")

    def moving() -> list[Path]:
        return [stat for stat in threads.glob("*/stat") if stat.read_text().rpartition(")")[2].split()[0] != "T"]

    eventually(lambda: not moving(), "the process stands still")


def leases(client: Any) -> int:
    """Leases the broker has on record for this client's session."""
    sessions = client.status()["sessions"]
    own = [session for session in sessions if session["name"] == client.session.name]
    assert len(own) == 1, f"{client.session.name!r} is not exactly one of {sessions}"
    return int(own[0]["leases"])


def marks(image: Any) -> Any:
    """The elements of a result in which the hand-off model leaves what it read."""
    flat = image.reshape(-1)
    step = flat.shape[0] // 16
    return flat[0 : 16 * step : step]


def expected_marks(latent: Any) -> Any:
    """The first sixteen elements of a latent, row-major, whatever its strides."""
    first = latent.reshape(-1)[:16]
    return first.float() if isinstance(first, torch.Tensor) else first.astype("float32")


@pytest.fixture
def tied() -> Any:
    from modules import Tied

    torch.manual_seed(2)
    return Tied().eval()


@pytest.fixture
def file(tied: Any, tmp_path: Path) -> Path:
    from modules import write

    return write(tied, tmp_path / "tied.safetensors")
