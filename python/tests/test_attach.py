"""Attached weights are the file's, bit for bit, in memory that exists once."""

from __future__ import annotations

import copy
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from conftest import DEADLINE_S, eventually
from safetensors.torch import load_file, save_file

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
MANY = 10_000


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor consists of: numbers that are none are equal to themselves."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Of every element type: ordinary numbers, and those that conversions go wrong on."""
    torch.manual_seed(1)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-8, 65504.0, 65520.0, 3.1e38])
    made = {f"float.{dtype}": torch.cat([torch.randn(3, 11).flatten() * 50, special]).to(dtype) for dtype in FLOATS}
    made |= {f"float8.{dtype}": (torch.randn(4, 7) * 9).to(dtype) for dtype in FLOATS8}
    made |= {f"integer.{dtype}": torch.arange(12).reshape(3, 4).to(dtype) for dtype in INTEGERS}
    made["bool"] = torch.tensor([True, False, True])
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.empty(0, 4)
    made["deep"] = torch.randn(2, 1, 3, 1, 2)
    return made


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def weights(client: Any, file: Path) -> Iterator[luna_broker.Weights]:
    with client.attach(file) as attached:
        yield attached


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def holders(client: Any, path: Path) -> list[dict[str, Any]]:
    return [holder for report in reports(client, path) for holder in report["holders"]]


def reports(client: Any, path: Path) -> list[dict[str, Any]]:
    # By name: of several files with the same tensors, `path` tells one.
    return [report for report in client.status()["weights"] if str(path) in report["names"]]


def test_every_element_type_is_the_file_s_bit_for_bit(file: Path, weights: luna_broker.Weights) -> None:
    expected = load_file(file)
    assert set(weights) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(weights[key], tensor), key


def test_weights_tell_what_they_are(file: Path, weights: luna_broker.Weights) -> None:
    assert (weights.name, weights.device) == (str(file), "cpu")
    assert len(weights.digest) == 64
    assert weights.size_bytes >= file.stat().st_size // 2
    assert f"{len(weights)} tensors" in repr(weights)


def test_tensors_lie_in_the_broker_s_memory_and_are_aligned(weights: luna_broker.Weights) -> None:
    start, end = weights._held().span
    for key, tensor in weights.items():
        if tensor.numel():
            assert start <= tensor.data_ptr() < end, key
            assert tensor.data_ptr() % 64 == 0, key


@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_conversion_is_torch_s_bit_for_bit(
    client: Any, file: Path, tensors: dict[str, torch.Tensor], wanted: torch.dtype
) -> None:
    with client.attach(file, dtype=wanted) as weights:
        for key, tensor in tensors.items():
            expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
            assert same_numbers(weights[key], expected), key


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As `same_bits`; of the many patterns for "no number", torch itself gives several for one conversion."""
    if not one.is_floating_point():
        return same_bits(one, other)
    nan, other_nan = one != one, other != other
    return torch.equal(nan, other_nan) and same_bits(one.masked_fill(nan, 0), other.masked_fill(other_nan, 0))


@pytest.mark.parametrize("name", [torch.float16, np.float16, np.dtype("float16"), "float16"], ids=repr)
def test_element_types_go_by_any_library_s_name(client: Any, file: Path, name: Any) -> None:
    with client.attach(file, dtype=name) as weights:
        assert weights["deep"].dtype == torch.float16


def test_the_longest_prefix_decides_the_element_type(client: Any, file: Path) -> None:
    rule = {"": torch.float16, "float.": "bfloat16", "float.torch.float64": None}
    with client.attach(file, dtype=rule) as weights:
        assert weights["deep"].dtype == torch.float16
        assert weights["float.torch.float32"].dtype == torch.bfloat16
        assert weights["float.torch.float64"].dtype == torch.float64
        assert weights["integer.torch.int32"].dtype == torch.int32


def test_what_nothing_is_converted_to_is_refused(client: Any, file: Path) -> None:
    with pytest.raises(luna_broker.Unsupported, match="int32"):
        client.attach(file, dtype=torch.int32)
    with pytest.raises(TypeError, match="complex64"):
        client.attach(file, dtype=torch.complex64)
    with pytest.raises(TypeError, match="beginnings of keys"):
        client.attach(file, dtype={1: torch.float16})


def test_each_tensor_has_a_storage_of_its_own(weights: luna_broker.Weights, tmp_path: Path) -> None:
    for key, tensor in weights.items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
        assert tensor.storage_offset() == 0
    saved = tmp_path / "again.safetensors"
    save_file(dict(weights), saved)
    for key, tensor in load_file(saved).items():
        assert same_bits(tensor, weights[key]), key


def test_a_deep_copy_is_private_and_plain(weights: luna_broker.Weights) -> None:
    copied = copy.deepcopy(weights)
    assert type(copied) is dict
    start, end = weights._held().span
    assert not any(start <= tensor.data_ptr() < end for tensor in copied.values() if tensor.numel())
    copied["deep"].zero_()
    assert weights["deep"].any()


ATTACH_AND_TELL = """
import sys, luna_broker, torch
client = luna_broker.connect(sys.argv[1])
weights = client.attach(sys.argv[2])
print(weights.digest, weights["deep"].flatten().tolist(), flush=True)
"""


def test_a_write_is_seen_by_nobody_else_and_counted(
    broker: Any, client: Any, file: Path, weights: luna_broker.Weights
) -> None:
    before = weights["deep"].flatten().tolist()
    assert weights.diverged_bytes == 0
    weights["deep"].add_(1.0)
    assert weights["deep"].flatten().tolist() != before
    told = run(ATTACH_AND_TELL, broker.address, file)
    assert (told.stdout, told.stderr) == (f"{weights.digest} {before}\n", "")
    pages = weights.diverged_bytes
    assert pages is not None
    assert 0 < pages < weights.size_bytes + 4096
    own = [holder for holder in holders(client, file) if holder["pid"] == os.getpid()]
    assert [holder["diverged_bytes"] for holder in own] == [pages]
    weights.reattach()
    assert (weights["deep"].flatten().tolist(), weights.diverged_bytes) == (before, 0)


def test_two_attach_one_memory(client: Any, broker: Any, file: Path, weights: luna_broker.Weights) -> None:
    with luna_broker.connect(broker.address) as other, other.attach(file) as again:
        assert again.digest == weights.digest
        (report,) = reports(client, file)
        assert (len(report["holders"]), report["saved_bytes"]) == (2, report["bytes"])


def test_closed_weights_are_held_no_more_and_their_tensors_stay(client: Any, file: Path) -> None:
    weights = client.attach(file)
    kept = weights["deep"]
    expected = kept.clone()
    weights.close()
    assert not weights
    with pytest.raises(luna_broker.Stale, match="closed by this process"):
        weights.check()
    assert len(holders(client, file)) == 1
    assert torch.equal(kept, expected)
    del kept
    gc.collect()
    # Not later: who asks next finds it so.
    assert holders(client, file) == []
    client.unload(file)


def test_weights_in_use_are_not_unloaded_but_by_force(client: Any, file: Path, weights: luna_broker.Weights) -> None:
    expected = load_file(file)["deep"]
    with pytest.raises(luna_broker.InUse) as refused:
        client.unload(file)
    assert refused.value.kind == "InUse"
    assert refused.value.remedy
    weights.check()
    client.unload(file, force=True)
    with pytest.raises(luna_broker.Stale):
        weights.check()
    assert torch.equal(weights["deep"], expected)
    weights.reattach()
    weights.check()
    assert torch.equal(weights["deep"], expected)


def test_weights_of_a_file_that_became_another_are_not_taken_for_the_same(client: Any, file: Path) -> None:
    with client.attach(file) as weights:
        old = weights["deep"].clone()
        fresh = file.with_suffix(".new")
        save_file({"deep": old + 1}, fresh)
        fresh.rename(file)
        with pytest.raises(luna_broker.Stale):
            weights.reattach()
        assert torch.equal(weights["deep"], old)
    with client.attach(file) as weights:
        assert torch.equal(weights["deep"], old + 1)


def test_killed_broker_is_noticed_and_its_successor_taken_hold_of(start_broker: Any, file: Path) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client, client.attach(file, dtype=torch.float16) as weights:
        expected = weights["deep"].clone()
        address = weights["deep"].data_ptr()
        broker.kill()
        with pytest.raises(luna_broker.ConnectionLost):
            weights.check()
        with pytest.raises(luna_broker.ConnectionLost):
            weights.reattach()
        assert torch.equal(weights["deep"], expected)
        broker.start()
        with pytest.raises(luna_broker.ConnectionLost):
            weights.check()
        weights.reattach()
        weights.check()
        assert weights["deep"].data_ptr() == address
        assert torch.equal(weights["deep"], expected)
        assert [holder["attachments"] for holder in holders(client, file)] == [1]


def test_a_verified_set_tells_that_it_is_what_it_was(client: Any, file: Path, weights: luna_broker.Weights) -> None:
    (report,) = client.verify(file)
    assert report["found"] == report["expected"] == weights.digest
    with pytest.raises(luna_broker.ModelNotFound):
        client.verify("no-such-weights")


def test_what_is_no_file_of_tensors_is_refused(client: Any, tmp_path: Path) -> None:
    with pytest.raises(luna_broker.ModelNotFound):
        client.attach(tmp_path / "absent.safetensors")
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(luna_broker.InvalidModel):
        client.attach(pickle)
    with pytest.raises(luna_broker.Unsupported):
        client.attach(tmp_path / "absent.safetensors", device="cuda:0")


PUBLISH = """
import sys, luna_broker, torch
client = luna_broker.connect(sys.argv[1])
weights = client.publish("merged", {"weight": torch.arange(12.0).reshape(3, 4).t(), "bias": torch.ones(2)})
print(weights.digest, flush=True)
sys.stdin.read()
"""


def test_what_one_process_publishes_another_attaches(broker: Any, client: Any) -> None:
    command = [sys.executable, "-c", PUBLISH, broker.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as publisher:
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        digest = publisher.stdout.readline().strip()
        with client.attach("merged") as weights:
            assert weights.digest == digest
            assert torch.equal(weights["weight"], torch.arange(12.0).reshape(3, 4).t())
            publisher.stdin.close()
            assert publisher.wait(DEADLINE_S) == 0
            # It stays for those who have it.
            weights.check()
            assert torch.equal(weights["bias"], torch.ones(2))
    client.unload("merged")


def test_published_tensors_may_lie_in_any_way(client: Any) -> None:
    grid = torch.arange(24.0).reshape(2, 3, 4)
    given = {
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "transposed": grid.permute(2, 0, 1),
        "every second": grid[:, ::2],
        "one column": torch.zeros(1, 5)[:, ::5],
        "expanded": torch.ones(1).expand(4),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "half": grid.to(torch.bfloat16),
        "eighth": grid.to(torch.float8_e5m2),
        "scalar": torch.tensor(7),
        "empty": torch.empty(3, 0),
        "flags": torch.tensor([True, False]),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "read-only": np.broadcast_to(np.float32(2.0), (2, 2)),
    }
    with client.publish("any layout", given) as weights:
        for key, tensor in given.items():
            expected = torch.from_numpy(tensor.copy()) if isinstance(tensor, np.ndarray) else tensor.detach()
            assert same_bits(weights[key], expected.contiguous().resolve_neg()), key
            assert weights[key].is_contiguous()
            assert not weights[key].requires_grad
    client.unload("any layout")


def test_published_sets_are_attached_in_the_types_that_are_asked_for(client: Any) -> None:
    given = torch.linspace(0, 1, 1000)
    with client.publish("typed", {"a.weight": given, "b.weight": given}):
        with client.attach("typed", dtype={"a.": torch.bfloat16}) as weights:
            assert torch.equal(weights["a.weight"], given.to(torch.bfloat16))
            assert torch.equal(weights["b.weight"], given)
            with client.attach("typed", dtype={"a.": torch.bfloat16}) as again:
                assert again.digest == weights.digest
        with pytest.raises(luna_broker.Unsupported, match="CUDA|GPU"):
            client.attach("typed", device="cuda:0")
    client.unload("typed")


def test_published_names_are_taken_while_somebody_has_them(client: Any) -> None:
    with client.publish("taken", {"weight": torch.zeros(2)}) as weights:
        with client.publish("taken", {"weight": torch.zeros(2)}) as same:
            assert same.digest == weights.digest
        with pytest.raises(luna_broker.InUse):
            client.publish("taken", {"weight": torch.ones(2)})
    with pytest.raises(TypeError):
        client.publish("taken", {"weight": "no tensor"})
    client.unload("taken")


WITHOUT_TORCH = """
import sys, luna_broker, numpy
client = luna_broker.connect(sys.argv[1])
weights = client.attach(sys.argv[2])
assert "torch" not in sys.modules
assert isinstance(weights["deep"], numpy.ndarray) and weights["deep"].dtype == numpy.float32
assert weights["integer.torch.uint32"].dtype == numpy.uint32 and weights["bool"].tolist() == [True, False, True]
assert weights["scalar"].shape == () and weights["empty"].shape == (0, 4)
half = weights["float.torch.bfloat16"]
assert isinstance(half, luna_broker.DeviceTensor) and (half.dtype, half.device) == ("bfloat16", "cpu")
print(weights["deep"].flatten().tolist(), half.tobytes().hex())
weights["deep"][:] = 0
published = client.publish("of arrays", {"a": numpy.arange(4.0)[::-1]})
assert published["a"].tolist() == [3, 2, 1, 0]
"""


def test_without_torch_the_tensors_are_numpy_s(broker: Any, file: Path, tensors: dict[str, torch.Tensor]) -> None:
    ran = run(WITHOUT_TORCH, broker.address, file)
    half = bits(tensors["float.torch.bfloat16"]).numpy().tobytes().hex()
    assert (ran.stdout, ran.stderr) == (f"{tensors['deep'].flatten().tolist()} {half}\n", "")


def test_ten_thousand_tensors_are_attached(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({f"layers.{number}.weight": torch.full((3,), float(number)) for number in range(MANY)}, path)
    with client.attach(path) as weights:
        assert len(weights) == MANY
        assert all(int(weights[f"layers.{number}.weight"][2]) == number for number in range(0, MANY, 97))
        taken = [timed_attach(client, path) for _ in range(3)]
    # 30 ms on two cores of 2024; a call for each tensor would be several times this.
    print(f"attaching {MANY} tensors that are loaded: {min(taken) * 1e3:.0f} ms")


def timed_attach(client: Any, path: Path) -> float:
    began = time.perf_counter()
    client.attach(path).close()
    return time.perf_counter() - began


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that takes a moment to load: longer than progress is told about, on any disk."""
    path = tmp_path / "large.safetensors"
    save_file({f"t{number}": torch.rand(4_000_000) for number in range(24)}, path)
    return path


def test_progress_is_told_and_grows(start_broker: Any, large: Path) -> None:
    told: list[tuple[int, int]] = []
    with luna_broker.connect(start_broker().address) as client:
        client.attach(large, dtype=torch.float64, progress=lambda done, total: told.append((done, total)))
        assert told
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert all(0 <= done <= total for done, total in told)
        told.clear()
        client.attach(large, dtype=torch.float64, progress=lambda *step: told.append(step)).close()
        assert told == []


def test_what_progress_raises_ends_the_call_and_leaves_the_client_usable(start_broker: Any, large: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyError("enough")

    with luna_broker.connect(start_broker().address) as client:
        with pytest.raises(KeyError, match="enough"):
            client.attach(large, dtype=torch.float64, progress=stop)
        assert client.attach(large, progress=False)["t3"].shape == (4_000_000,)
        with pytest.raises(TypeError, match="progress"):
            client.attach(large, progress="loud")


def test_a_header_says_what_attaching_would_give(client: Any, file: Path) -> None:
    header = client.header(file)
    with client.attach(file) as weights:
        assert header == {key: (str(one.dtype).removeprefix("torch."), list(one.shape)) for key, one in weights.items()}
    with pytest.raises(luna_broker.ModelNotFound):
        client.header("nowhere.safetensors")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to hold a broker still")
def test_other_threads_run_while_one_attaches_and_ctrl_c_ends_it(
    start_broker: Any, file: Path, request: pytest.FixtureRequest
) -> None:
    # A shell that starts its jobs in the background has them ignore what a terminal's Ctrl-C sends.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    broker = start_broker()
    client = luna_broker.connect(broker.address)
    os.kill(broker.pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        client.attach(file)
    os.kill(broker.pid, signal.SIGCONT)
    client.attach(file).close()


BAR = """
import sys, luna_broker.progress as progress
if sys.argv[1] == "line":
    sys.modules["tqdm.auto"] = None
progress.PATIENCE_S = 0.0
sys.stderr.isatty = lambda: sys.argv[2] == "watched"
bar = progress.Bar("/models/unet.safetensors")
for done in (0, 500_000_000, 2_000_000_000):
    bar(done, 2_000_000_000)
bar.close()
"""


@pytest.mark.parametrize("kind", ["line", "tqdm"])
def test_a_bar_is_drawn_for_a_terminal_alone(kind: str) -> None:
    if kind == "tqdm":
        pytest.importorskip("tqdm")
    drawn = run(BAR, kind, "watched").stderr
    assert "unet.safetensors" in drawn
    assert "100" in drawn
    assert drawn.endswith("\n")
    assert run(BAR, kind, "unwatched").stderr == ""


def test_a_worker_that_is_killed_holds_nothing(broker: Any, client: Any, file: Path) -> None:
    script = ATTACH_AND_TELL + "sys.stdin.read()"
    command = [sys.executable, "-c", script, broker.address, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline()
        assert [holder["pid"] for holder in holders(client, file)] == [worker.pid]
        worker.kill()
        worker.wait()
    eventually(lambda: not holders(client, file), "the killed worker's hold ends")
