"""Modules on attached weights are where they are wanted, or it is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from luna_broker.torch import load_attached, skeleton
from modules import (
    TOKENS,
    Tied,
    empty,
    private_bytes,
    write,
)
from torch import nn


class Elsewhere(torch.Tensor):
    """As if in another device's memory, which this machine need not have."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


class Movable(torch.Tensor):
    """On the CPU, and as if it could go elsewhere."""

    def to(self, device: torch.device) -> torch.Tensor:  # type: ignore[override]
        assert device == Elsewhere.device
        return self.as_subclass(Elsewhere)


class ClientElsewhere:
    """Attaches what claims to be on a GPU."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.asked: list[str | None] = []

    def attach(self, name: str, *, dtype: Any, device: str | None) -> luna_broker.Weights:
        self.asked.append(device)
        weights = self.client.attach(name, dtype=dtype)
        weights.device = str(Elsewhere.device)
        for key in list(weights):
            weights[key] = weights[key].as_subclass(Elsewhere)
        return weights


@pytest.fixture
def elsewhere(client: Any, monkeypatch: pytest.MonkeyPatch) -> ClientElsewhere:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return ClientElsewhere(client)


def test_weights_elsewhere_than_the_module_are_refused(elsewhere: Any, file: Path) -> None:
    weights = elsewhere.attach(file, dtype=None, device=None)
    with pytest.raises(luna_broker.InvalidTensor, match="cpu in the module, cuda:1 attached") as refused:
        load_attached(Tied().eval(), weights)
    assert "device=" in refused.value.remedy
    # Naming the device moves buffers and no parameters.
    with pytest.raises(luna_broker.InvalidTensor, match=r"embed.weight = head.weight \(cpu in the module") as refused:
        load_attached(Tied().eval(), weights, device="cuda:1")
    assert "skeleton" in refused.value.remedy


def test_a_device_for_weights_that_are_on_another_is_refused(client: Any, elsewhere: Any, file: Path) -> None:
    with pytest.raises(luna_broker.InvalidTensor, match="is on cpu already, not on cuda:1") as refused:
        load_attached(empty(), client.attach(file), device="cuda")
    assert "device='cuda:1'" in refused.value.remedy


@pytest.mark.parametrize("device", ["cuda:1", "cuda", torch.device("cuda", 1)])
def test_a_skeleton_is_put_where_it_is_wanted_with_its_buffers(
    elsewhere: Any, tied: Tied, tmp_path: Path, device: Any
) -> None:
    path = write(tied, tmp_path / "part.safetensors", leave_out="scale")
    module = empty()
    module.ids, module.scale = module.ids.as_subclass(Movable), module.scale.as_subclass(Movable)
    weights = load_attached(module, path, client=elsewhere, device=device, strict=False)
    assert elsewhere.asked == ["cuda:1"]
    assert weights.device == "cuda:1"
    assert {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())} == {"cuda:1"}
    assert "ids" not in module.state_dict()


def test_buffers_come_back_where_the_module_refuses_its_weights(elsewhere: Any, file: Path) -> None:
    class Picky(nn.LayerNorm):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, Elsewhere):
                raise RuntimeError("not there")
            super().__setattr__(name, value)

    module = empty()
    with skeleton():
        module.inner[1] = Picky(6)
    module.ids = module.ids.as_subclass(Movable)
    ids, scale = module.ids, module.scale
    with pytest.raises(RuntimeError, match="not there"):
        load_attached(module, file, client=elsewhere, device="cuda")
    assert module.ids is ids
    assert module.scale is scale
    assert module.embed.weight.is_meta


def test_stored_buffers_of_a_skeleton_are_attached_where_they_are_wanted(
    elsewhere: Any, tied: Tied, file: Path
) -> None:
    module = empty()
    module.ids = module.ids.as_subclass(Movable)
    weights = load_attached(module, file, client=elsewhere, device="cuda:1")
    assert private_bytes(module, weights) == 0
    assert module.scale.device == Elsewhere.device
    assert torch.equal(module(TOKENS), tied(TOKENS))


def test_parameters_left_elsewhere_than_wanted_are_refused(elsewhere: Any, tied: Tied, tmp_path: Path) -> None:
    path = write(tied, tmp_path / "part.safetensors", leave_out="inner.0.bias")
    module = empty()
    module.inner[0].bias = nn.Parameter(torch.zeros(6))
    with pytest.raises(luna_broker.InvalidTensor, match=r"inner.0.bias \(cpu, and not attached\)"):
        load_attached(module, path, client=elsewhere, device="cuda:1", strict=False)
    assert module.ids.device == torch.device("cpu")


def test_the_cpu_can_be_named_as_the_device(client: Any, tied: Tied, file: Path) -> None:
    module = empty()
    ids = module.ids
    assert load_attached(module, file, client=client, device="cpu").device == "cpu"
    assert module.ids is ids
    assert torch.equal(module(TOKENS), tied(TOKENS))
    load_attached(empty(), client.attach(file), device=torch.device("cpu"))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:9", "mps", "meta", "nowhere"])
def test_devices_that_cannot_be_had_are_unsupported(
    client: Any, file: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = empty()
    with pytest.raises(luna_broker.Unsupported, match=device) as refused:
        load_attached(module, file, client=client, device=device)
    assert refused.value.remedy
    assert all(parameter.is_meta for parameter in module.parameters())
