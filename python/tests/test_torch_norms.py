"""Buffers that a forward writes are not shared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from luna_broker.torch import load_attached, skeleton
from modules import (
    private_bytes,
    write,
)
from safetensors.torch import load_file
from torch import nn


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


PIXELS = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


@pytest.fixture
def normed_file(tmp_path: Path) -> Path:
    trained = normed()
    trained(PIXELS)
    return write(trained, tmp_path / "normed.safetensors")


def test_running_statistics_are_read_in_eval_mode_and_not_written(client: Any, normed_file: Path) -> None:
    private = normed().eval()
    private.load_state_dict(load_file(normed_file))
    with skeleton():
        module = normed().eval()
    weights = load_attached(module, normed_file, client=client)
    assert private_bytes(module, weights) == 0
    with torch.no_grad():
        assert torch.equal(module(PIXELS), private(PIXELS))
    assert weights.diverged_bytes == 0
    assert [report["found"] == report["expected"] for report in client.verify(normed_file)] == [True]


def test_running_statistics_in_training_mode_are_refused(client: Any, normed_file: Path) -> None:
    module = normed()
    before = module.state_dict(keep_vars=True)
    with pytest.raises(luna_broker.InvalidTensor, match=r"1.running_mean \(BatchNorm2d\)") as refused:
        load_attached(module, normed_file, client=client)
    assert "module.eval()" in refused.value.remedy
    assert all(tensor is before[name] for name, tensor in module.state_dict(keep_vars=True).items())
    # What has no statistics may be in whatever mode it likes.
    norm = module[1].eval()
    assert module.training
    load_attached(module, normed_file, client=client)
    assert module[1] is norm


@pytest.mark.parametrize("check", [True, False])
def test_a_norm_that_is_trained_later_is_refused_before_it_writes(client: Any, normed_file: Path, check: bool) -> None:
    module = normed().eval()
    weights = load_attached(module, normed_file, client=client, check=check)
    expected = module(PIXELS)
    module.train()
    with pytest.raises(luna_broker.InvalidTensor, match="BatchNorm2d in training mode would write to running_mean"):
        module(PIXELS)
    assert weights.diverged_bytes == 0
    # A copy has statistics of its own.
    copied = copy.deepcopy(module)
    copied(PIXELS)
    assert copied[1].num_batches_tracked == module[1].num_batches_tracked + 1
    assert torch.equal(module.eval()(PIXELS), expected)
    # So has a module that got them back.
    for name, buffer in module[1].named_buffers():
        setattr(module[1], name, buffer.clone())
    module.train()(PIXELS)
    assert weights.diverged_bytes == 0


def test_spectral_norms_are_only_for_eval_mode_too(client: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))

    path = write(build(), tmp_path / "spectral.safetensors")
    with pytest.raises(luna_broker.InvalidTensor, match="_u"):
        load_attached(build(), path, client=client)
    module = build().eval()
    weights = load_attached(module, path, client=client)
    module(torch.ones(3))
    module.train()
    with pytest.raises(luna_broker.InvalidTensor, match="would write to _u"):
        module(torch.ones(3))
    assert weights.diverged_bytes == 0
