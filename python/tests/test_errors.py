"""Wrong input gets an error of its kind that says what to do, and the client stays usable."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from conftest import HAND_OFF, eventually, expected_marks, leases, marks
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

KINDS = (
    "Busy",
    "Cancelled",
    "ConfigurationError",
    "ConnectionLost",
    "InvalidModel",
    "InvalidTensor",
    "ModelNotFound",
    "OutOfMemory",
    "ProtocolError",
    "Refused",
    "ShuttingDown",
    "Stale",
    "Timeout",
    "Unsupported",
)


@pytest.fixture(autouse=True)
def client_stays_usable(client: Any) -> Iterator[None]:
    yield
    vae = client.vae(HAND_OFF)
    latent = torch.randn(1, vae.info["latent_channels"], 4, 4)
    assert torch.equal(marks(vae.decode(latent)), expected_marks(latent))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_has_a_class_under_one_base(name: str) -> None:
    assert issubclass(getattr(luna_broker, name), luna_broker.LunaBrokerError)
    assert name in luna_broker.__all__


def test_out_of_memory_is_torch_s_out_of_memory_too() -> None:
    assert issubclass(luna_broker.OutOfMemory, torch.OutOfMemoryError)


@pytest.mark.parametrize("model", [HAND_OFF, "constructed"])
@pytest.mark.parametrize(
    "latent",
    [
        pytest.param(torch.zeros(()), id="scalar"),
        pytest.param(torch.zeros(4, 8, 8), id="no-batch"),
        pytest.param(torch.zeros(1, 4, 1, 8, 8), id="five-axes"),
        pytest.param(torch.zeros(1, 5, 8, 8), id="five-channels"),
        pytest.param(torch.zeros(1, 8, 8, 4), id="channels-last-axis"),
        pytest.param(torch.zeros(1, 4, 8, 8, dtype=torch.int64), id="int64"),
        pytest.param(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), id="uint8"),
        pytest.param(torch.zeros(1, 4, 8, 8, dtype=torch.bool), id="bool"),
        pytest.param(torch.zeros(1, 4, 8, 8, dtype=torch.complex64), id="complex"),
        pytest.param(torch.zeros(0, 4, 8, 8), id="empty-batch"),
        pytest.param(torch.zeros(1, 4, 0, 8), id="no-rows"),
        pytest.param(torch.zeros(1, 4, 8, 0), id="no-columns"),
    ],
)
def test_latent_that_does_not_fit_is_an_invalid_tensor(
    client: Any, constructed_vae: str, model: str, latent: torch.Tensor
) -> None:
    vae = client.vae(constructed_vae if model == "constructed" else model)
    with pytest.raises(luna_broker.InvalidTensor):
        vae.decode(latent)
    if latent.dtype != torch.bool:
        with pytest.raises(luna_broker.InvalidTensor):
            vae.decode(latent.numpy())


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(torch.zeros(16, 16, 3), id="no-batch"),
        pytest.param(torch.zeros(1, 3, 16, 16), id="channels-first"),
        pytest.param(torch.zeros(1, 16, 16, 2), id="two-channels"),
        pytest.param(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), id="uint8"),
        pytest.param(torch.zeros(1, 7, 16, 3), id="smaller-than-one-latent-element"),
        pytest.param(torch.zeros(0, 16, 16, 3), id="empty-batch"),
    ],
)
def test_image_that_does_not_fit_is_an_invalid_tensor(client: Any, constructed_vae: str, image: torch.Tensor) -> None:
    with pytest.raises(luna_broker.InvalidTensor):
        client.vae(constructed_vae).encode(image)


@pytest.mark.parametrize("thing", [None, "latent", 3.5, [[1.0]], object()])
def test_what_is_no_tensor_at_all_is_refused(client: Any, thing: object) -> None:
    with pytest.raises((TypeError, luna_broker.InvalidTensor)):
        client.vae(HAND_OFF).decode(thing)


def _missing(folder: Path) -> Path:
    return folder / "missing.safetensors"


def _directory(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda: torch.zeros(1, 4, 8, 8, device="meta"), "meta", id="meta"),
        pytest.param(lambda: torch.zeros(1, 4, 8, 8).to_sparse(), "torch.sparse_coo", id="sparse"),
        pytest.param(
            lambda: torch.quantize_per_tensor(torch.zeros(1, 4, 8, 8), 0.1, 0, torch.quint8), "quint8", id="quantized"
        ),
    ],
)
def test_tensor_that_torch_does_not_export_is_named_with_a_way_out(
    client: Any, make: Callable[[], torch.Tensor], says: str
) -> None:
    with pytest.raises(luna_broker.InvalidTensor) as raised:
        client.vae(HAND_OFF).decode(make())
    message = str(raised.value)
    assert says in message
    assert "[1, 4, 8, 8]" in message
    assert "\n" not in message
    assert len(message) < 500
    assert raised.value.remedy
    assert raised.value.kind == "InvalidTensor"
    assert raised.value.__cause__ is not None


def test_tensor_without_memory_is_refused(client: Any) -> None:
    with FakeTensorMode():
        latent = torch.zeros(1, 4, 8, 8)
    with pytest.raises(luna_broker.InvalidTensor) as raised:
        client.vae(HAND_OFF).decode(latent)
    assert raised.value.remedy


def _pickle(folder: Path) -> Path:
    path = folder / "model.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    return path


def _renamed_pickle(folder: Path) -> Path:
    return _pickle(folder).rename(folder / "model.safetensors")


def _empty(folder: Path) -> Path:
    path = folder / "empty.safetensors"
    path.touch()
    return path


def _truncated(folder: Path) -> Path:
    path = folder / "truncated.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _huge_header(folder: Path) -> Path:
    path = folder / "header.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    return path


def _no_vae(folder: Path) -> Path:
    path = folder / "other.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}, path)
    return path


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_missing, "ModelNotFound"),
        (_directory, "InvalidModel"),
        (_pickle, "InvalidModel"),
        (_renamed_pickle, "InvalidModel"),
        (_empty, "InvalidModel"),
        (_truncated, "InvalidModel"),
        (_huge_header, "InvalidModel"),
        (_no_vae, "InvalidModel"),
    ],
)
def test_file_that_is_no_vae_gets_an_error_with_a_remedy(
    client: Any, tmp_path: Path, make: Callable[[Path], Path], kind: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(getattr(luna_broker, kind)) as raised:
        client.vae(str(path))
    assert path.name in str(raised.value)
    assert raised.value.remedy


def test_pickle_checkpoint_error_says_how_to_convert(client: Any, tmp_path: Path) -> None:
    with pytest.raises(luna_broker.InvalidModel) as raised:
        client.vae(str(_pickle(tmp_path)))
    assert "safetensors" in raised.value.remedy


def test_unknown_name_is_not_found(client: Any) -> None:
    with pytest.raises(luna_broker.ModelNotFound) as raised:
        client.vae("no-such-model")
    assert "no-such-model" in str(raised.value)
    assert raised.value.remedy


def test_error_tells_its_kind(client: Any) -> None:
    with pytest.raises(luna_broker.LunaBrokerError) as not_found:
        client.vae("no-such-model")
    with pytest.raises(luna_broker.LunaBrokerError) as invalid:
        client.vae(HAND_OFF).decode(np.zeros((1, 4, 8), np.float32))
    assert not_found.value.kind == "ModelNotFound"
    assert invalid.value.kind == "InvalidTensor"


def test_failed_call_keeps_no_lease(client: Any) -> None:
    vae = client.vae(HAND_OFF)
    for _ in range(20):
        with pytest.raises(luna_broker.InvalidTensor):
            vae.decode(torch.zeros(1, 5, 8, 8))
    eventually(lambda: leases(client) == 0, "failed calls leave no lease behind")
