"""What the tests share: models, a broker, a ComfyUI without the pack and what it paints, one with the pack."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))

import checkpoints  # noqa: E402
import picture  # noqa: E402
import workers  # noqa: E402
from broker_process import BrokerProcess  # noqa: E402
from comfy import ComfyUI  # noqa: E402
from compare import assert_equal, assert_near  # noqa: E402
from graphs import STOCK, Graph, Loaders  # noqa: E402
from result import Result  # noqa: E402
from workers import StartComfyUI  # noqa: E402

import broker as brokers  # noqa: E402

# Else a test run that is told to end leaves its ComfyUIs behind.
signal.signal(signal.SIGTERM, signal.default_int_handler)

Build = Callable[[Loaders], Graph]
Reference = Callable[[Build], Result]

# Flags of ComfyUI. By itself it has text encoders in fp16 and, on a CPU, attention that sums in another order; neither
# is what the broker does, and over a sampler's steps both grow beyond what is allowed.
ARITHMETIC: dict[str, tuple[str, ...]] = {
    "attached": (),
    "remote": ("--fp32-text-enc", "--use-pytorch-cross-attention"),
}

# Beside what else is built: making the models takes a minute and 5 GB.
MODELS = REPOSITORY / "target" / "comfyui-models"
PACK = REPOSITORY / "python" / "luna_broker" / "comfyui"
TEST_NODES = Path(__file__).parent / "nodes"


@pytest.fixture(scope="session")
def checkout() -> Path:
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        pytest.skip("COMFYUI_PATH is not set: it names a checkout of ComfyUI to test with; see CONTRIBUTING.md")
    path = Path(named).resolve()
    if not (path / "main.py").is_file():
        pytest.fail(f"COMFYUI_PATH names {path}, which is no checkout of ComfyUI: it has no main.py")
    return path


@pytest.fixture(scope="session")
def binary() -> Path:
    named = os.environ.get("LUNA_BROKER_BIN")
    if not named:
        pytest.skip("LUNA_BROKER_BIN is not set: it names the luna-broker binary to test with")
    return Path(named).resolve()


@pytest.fixture(scope="session")
def models() -> Path:
    tools = Path(os.environ.get("LUNA_BROKER_SHARED", REPOSITORY.parent / "shared")) / "tools"
    if not (tools / "tinyckpt.py").is_file():
        pytest.skip(f"{tools} is absent, which has the generators of the models; LUNA_BROKER_SHARED names its parent")
    checkpoints.make(MODELS, tools)
    return MODELS


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    # Not pytest's folder: a socket's path must stay below about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="luna-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def comfyui(checkout: Path, models: Path, scratch: Path) -> Iterator[StartComfyUI]:
    """Starts a ComfyUI: `comfyui("name", pack=True)`; all of them are stopped in the end."""
    started: list[ComfyUI] = []
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)

    def start(name: str, pack: bool, *options: str) -> ComfyUI:
        packs = {"tests": TEST_NODES, **({"luna-broker": PACK} if pack else {})}
        environment = {
            "PYTHONPATH": str(REPOSITORY / "python"),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "2",
            # A worker that was told of no broker finds none.
            "LUNA_BROKER": str(scratch / "nobody.sock"),
        }
        process = ComfyUI(checkout, python, scratch / name, models, packs, options, environment)
        started.append(process)
        picture.write(process.base / "input")
        return process.start()

    yield start
    for process in started:
        process.kill()


class Side(NamedTuple):
    """What a mode is tried with."""

    worker: ComfyUI
    """With the pack; for all tests that leave it as they found it."""
    reference: Reference
    """What stock loaders make of a workflow, computed once: `reference(build)`, a builder of `workflows`."""
    compare: Callable[[Result, Result], None]
    """Fails where a result is not as near to the reference as the mode promises."""

    def check(self, build: Build, loaders: Loaders) -> Result:
        """Runs a workflow and holds what came of it against the reference."""
        result = self.worker.run(build(loaders)).ok()
        self.compare(result, self.reference(build))
        return result


@pytest.fixture(scope="session")
def side(comfyui: StartComfyUI) -> Callable[[str], Side]:
    """Worker and reference for "attached", as ComfyUI is by itself, and for "remote", in the broker's arithmetic."""
    known: dict[str, Side] = {}

    def of(mode: str) -> Side:
        if mode not in known:
            options = ARITHMETIC[mode]
            stock = comfyui(f"stock-{mode}", False, *options)
            worker = comfyui(f"worker-{mode}", True, "--preview-method", "latent2rgb", *options)
            known[mode] = Side(worker, remembering(stock), assert_equal if mode == "attached" else assert_near)
        return known[mode]

    return of


@pytest.fixture(scope="session")
def worker(side: Callable[[str], Side]) -> ComfyUI:
    """A ComfyUI with the pack, as it is by itself."""
    return side("attached").worker


@pytest.fixture(scope="session")
def broker(binary: Path, models: Path, scratch: Path) -> Iterator[BrokerProcess]:
    """A broker for all tests that leave it as they found it."""
    with brokers.start(binary, scratch / "shared.sock", models) as process:
        yield process


@pytest.fixture(scope="session")
def four(comfyui: StartComfyUI) -> dict[str, ComfyUI]:
    """Four more with the pack, by the names of their LoRA stacks."""
    return {name: comfyui(name, True, *ARITHMETIC["remote"]) for name in workers.STACKS}


@pytest.fixture(scope="session")
def grown(comfyui: StartComfyUI, binary: Path, models: Path, scratch: Path) -> dict[str, workers.Growth]:
    """What workers cost, the more the more, by mode; of stock ones as many as leave room for other tests."""
    found = {"stock": workers.grow(comfyui, "stock", 2, None)}
    for mode in ("attached", "remote"):
        with brokers.start(binary, scratch / f"{mode}.sock", models) as process:
            found[mode] = workers.grow(comfyui, mode, 4, process)
    return found


@pytest.fixture
def start_broker(binary: Path, models: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """Starts brokers of the test's own: `start_broker("--vae-budget", "1000000")`."""
    started: list[BrokerProcess] = []
    with tempfile.TemporaryDirectory(prefix="luna-") as folder:

        def start(*options: str) -> BrokerProcess:
            process = brokers.start(binary, Path(folder) / f"{len(started)}.sock", models, *options)
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()


def remembering(stock: ComfyUI) -> Reference:
    known: dict[str, Result] = {}

    def paint(build: Build) -> Result:
        graph = build(STOCK)
        key = repr(graph)
        if key not in known:
            known[key] = stock.run(graph).ok()
        return known[key]

    return paint


@pytest.fixture
def loaders(broker: BrokerProcess) -> Callable[[str], Loaders]:
    """The pack's loaders in a mode, on the shared broker."""
    return lambda mode: Loaders(mode, broker.address)
