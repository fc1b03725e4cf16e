"""Tensors in GPU memory, on the substitute CUDA driver: broker and worker are processes that find it as libcuda.

torch itself cannot run on that driver, so tensors are held as DLPack objects here, and looked into at the address that
DLPack gives: the substitute's GPU memory is memory of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import luna_broker
import numpy
import pytest

LIBRARY = "libluna_substitute_cuda.so"
WORKER_SECONDS = 60

PRELUDE = """
import ctypes, gc, sys
import numpy, luna_broker

class DlTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("kind", ctypes.c_int), ("ordinal", ctypes.c_int32)]

get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

def described(tensor):
    capsule = tensor.__dlpack__(stream=1)
    return DlTensor.from_address(get_pointer(capsule, b"dltensor")), capsule

def fill(tensor, values):
    found, capsule = described(tensor)
    ctypes.memmove(found.data, numpy.ascontiguousarray(values).ctypes.data, values.nbytes)

def marks(image):
    flat = numpy.frombuffer(image.tobytes(), numpy.float32)
    return flat[:: flat.size // 16][:16]

client = luna_broker.connect(sys.argv[1])
vae = client.vae("builtin:hand-off")
values = numpy.random.default_rng(7).random((1, 4, 16, 16), numpy.float32)

def rung():
    return client.session.rungs[-1]
"""


@pytest.fixture(scope="module")
def driver(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a process finds the substitute as its driver."""
    library = binary.parent / "deps" / LIBRARY
    if not library.exists():
        pytest.skip(
            f"{library} is not there: `cargo build --release -p luna-substitute-cuda` or `make test-rust` builds it"
        )
    folder = tmp_path_factory.mktemp("driver")
    for name in ("libcuda.so", "libcuda.so.1"):
        (folder / name).symlink_to(library)
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": search, "SUBSTITUTE_CUDA_RUN": str(folder / "run")}


@pytest.fixture
def broker_settings() -> dict[str, str]:
    """Settings of the substitute for the broker. Tests that need some are parametrised with them."""
    return {}


@pytest.fixture
def gpu_broker(
    binary: Path,
    driver: dict[str, str],
    broker_settings: dict[str, str],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[luna_broker.Client]:
    from broker_process import BrokerProcess

    for name, value in (driver | broker_settings).items():
        monkeypatch.setenv(name, value)
    options = ["--device", "cuda:0", "--bench-models"]
    with BrokerProcess(binary, scratch / "gpu.sock", options) as process:
        yield process


Worker = Callable[..., str]


@pytest.fixture
def worker(gpu_broker: object, driver: dict[str, str]) -> Worker:
    """Runs a program as a worker beside the broker; what it prints."""

    def run(program: str, **settings: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(program), gpu_broker.address],
            env=os.environ | driver | settings,
            capture_output=True,
            text=True,
            timeout=WORKER_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_tensor_built_on_the_gpu_crosses_without_a_copy_and_its_result_stays_there(worker: Worker) -> None:
    worker("""
        latent = client.empty((1, 4, 16, 16), numpy.float32, device="cuda:0")
        assert (latent.shape, latent.dtype, latent.device) == ((1, 4, 16, 16), "float32", "cuda:0")
        assert latent.__dlpack_device__() == (2, 0)
        fill(latent, values)
        image = vae.decode(latent)
        assert image.device == "cuda:0" and image.shape == (1, 128, 128, 3), image
        assert (marks(image) == values.reshape(-1)[:16]).all()
        assert vae.last.bytes_copied_in == 0
        assert (rung().rung, rung().order) == ("cuda-ipc", "events"), rung()
        found, capsule = described(image)
        assert (found.kind, found.ordinal) == (2, 0)
    """)


def test_gpu_memory_of_others_is_copied_once(worker: Worker) -> None:
    worker("""
        other = luna_broker.connect(sys.argv[1])
        theirs = other.empty((1, 4, 16, 16), numpy.float32, device="cuda:0")
        fill(theirs, values)
        image = vae.decode(theirs)
        assert (marks(image) == values.reshape(-1)[:16]).all()
        assert vae.last.bytes_copied_in == values.nbytes
    """)


def test_device_says_where_the_result_goes(worker: Worker) -> None:
    worker("""
        latent = client.empty((1, 4, 16, 16), numpy.float32, device="cuda:0")
        fill(latent, values)
        here = vae.decode(latent, device="cpu")
        assert isinstance(here, numpy.ndarray)
        assert (here.reshape(-1)[:: here.size // 16][:16] == values.reshape(-1)[:16]).all()
        there = vae.decode(values, device="cuda:0")
        assert there.device == "cuda:0"
        assert (marks(there) == values.reshape(-1)[:16]).all()
    """)


def test_dropped_tensors_give_their_memory_back_and_leaving_with_some_is_no_crash(worker: Worker) -> None:
    worker("""
        import time
        for _ in range(50):
            image = vae.decode(values, device="cuda:0")
            assert (marks(image) == values.reshape(-1)[:16]).all()
        del image
        until = time.monotonic() + 20
        own = lambda: next(one for one in client.status()["sessions"] if one["name"] == client.session.name)
        while own()["leases"] > 0:
            assert time.monotonic() < until, own()
            time.sleep(0.01)
        kept = vae.decode(values, device="cuda:0")
        capsule = kept.__dlpack__(stream=1, max_version=(1, 0))
    """)


# Each of the 16 copies of a decode takes so long: who does not wait reads what was there before.
SLOW_BROKER = pytest.mark.parametrize("broker_settings", [{"SUBSTITUTE_CUDA_DELAY_MS": "20"}])

STREAMS = """
cuda = ctypes.CDLL("libcuda.so.1")
LEGACY, PER_THREAD, NO_SYNC = 1, 2, -1

def done(code):
    assert code == 0, code

def synchronize(*streams):
    context = ctypes.c_void_p()
    done(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    done(cuda.cuCtxPushCurrent_v2(context))
    for stream in streams:
        done(cuda.cuStreamSynchronize(ctypes.c_void_p(stream)))
    done(cuda.cuCtxPopCurrent_v2(ctypes.byref(context)))
    done(cuda.cuDevicePrimaryCtxRelease_v2(0))

def handed_out(image, stream):
    capsule = image.__dlpack__(stream=stream)
    found = DlTensor.from_address(get_pointer(capsule, b"dltensor"))
    floats = numpy.ctypeslib.as_array(ctypes.cast(found.data, ctypes.POINTER(ctypes.c_float)), (3 * 128 * 128,))
    return floats[:: floats.size // 16][:16], capsule

# A copy from host memory would be waited for.
latent = client.empty((1, 4, 16, 16), numpy.float32, device="cuda:0")
fill(latent, values)

def is_there(found):
    return (found == values.reshape(-1)[:16]).all()

def let_go_of_everything():
    import time
    until = time.monotonic() + 20
    own = lambda: next(one for one in client.status()["sessions"] if one["name"] == client.session.name)
    while own()["leases"] > 0:
        assert time.monotonic() < until, own()
        time.sleep(0.01)
"""


@SLOW_BROKER
def test_the_calling_threads_own_stream_comes_behind_the_brokers_work(worker: Worker) -> None:
    program = """
image = vae.decode(latent)
found, capsule = handed_out(image, PER_THREAD)
assert not is_there(found), "the broker was not slow: the test shows nothing"
synchronize(PER_THREAD)
assert is_there(found)
del image, latent, found, capsule
gc.collect()
let_go_of_everything()
"""
    worker(STREAMS + program, SUBSTITUTE_CUDA_DELAY_MS="0")


@SLOW_BROKER
def test_a_consumer_that_sees_to_the_order_itself_is_not_made_to_wait(worker: Worker) -> None:
    program = """
image = vae.decode(latent)
found, capsule = handed_out(image, NO_SYNC)
synchronize(LEGACY, PER_THREAD)
assert not is_there(found), "some stream was made to wait"
image.tobytes()
assert is_there(found)
del image, latent, found, capsule
gc.collect()
let_go_of_everything()
"""
    worker(STREAMS + program, SUBSTITUTE_CUDA_DELAY_MS="0")


def test_another_pid_namespace_is_named_as_the_reason_for_the_next_rung(worker: Worker) -> None:
    reason = worker(
        """
        vae.decode(values, device="cuda:0")
        assert rung().rung == "cuda-vmm"
        print(rung().reason)
        """,
        SUBSTITUTE_CUDA_PID_NAMESPACE="container",
    )
    assert "cuda-ipc: open" in reason


def test_a_worker_without_a_driver_is_told_and_goes_on_with_host_memory(worker: Worker) -> None:
    message = worker(
        """
        try:
            client.empty((1,), numpy.float32, device="cuda:0")
        except luna_broker.Unsupported as error:
            print(error)
        assert isinstance(vae.decode(values), numpy.ndarray)
        """,
        SUBSTITUTE_CUDA_NO_DEVICE="1",
    )
    assert "driver" in message


@pytest.mark.parametrize("device", ["cuda:x", "mps", "cuda:"])
def test_a_device_that_is_none_is_refused_by_name(client: luna_broker.Client, device: str) -> None:
    latent = numpy.zeros((1, 4, 8, 8), numpy.float32)
    with pytest.raises(luna_broker.Unsupported, match=device):
        client.vae("builtin:hand-off").decode(latent, device=device)
