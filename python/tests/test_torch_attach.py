"""Modules on attached weights compute what they compute on their own, and nothing is copied without a word."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from luna_broker.torch import attached_weights, load_attached, skeleton
from modules import (
    REAL,
    TOKENS,
    Tied,
    empty,
    private_bytes,
    write,
)
from safetensors.torch import save_file
from torch import nn


@pytest.mark.parametrize(("build", "run"), REAL)
def test_real_modules_compute_the_same_bit_for_bit(
    client: Any, tmp_path: Path, build: Callable[[], nn.Module], run: Callable[[nn.Module], torch.Tensor]
) -> None:
    torch.manual_seed(1)
    private = build()
    path = write(private, tmp_path / "real.safetensors")
    with skeleton():
        module = build()
    assert all(parameter.is_meta for parameter in module.parameters())
    weights = load_attached(module, path, client=client)
    assert private_bytes(module, weights) == 0
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(run(module), run(private))
    assert len(list(module.parameters())) == len(list(private.parameters()))


def test_a_module_with_memory_of_its_own_gives_it_up(client: Any, tied: Tied, file: Path) -> None:
    module = Tied().eval()
    weights = load_attached(module, file, client=client)
    assert private_bytes(module, weights) == 0
    assert torch.equal(module(TOKENS), tied(TOKENS))


@pytest.mark.parametrize("left_out", ["head.weight", "embed.weight", None])
def test_tied_stays_tied_by_whichever_key_the_file_has(
    client: Any, tied: Tied, tmp_path: Path, left_out: str | None
) -> None:
    state = {key: tensor.clone() for key, tensor in tied.state_dict().items() if key != left_out}
    save_file(state, tmp_path / "tied.safetensors")
    module = empty()
    assert module.head.weight is module.embed.weight
    load_attached(module, tmp_path / "tied.safetensors", client=client)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module(TOKENS), tied(TOKENS))


def test_what_differs_is_not_tied(client: Any, tied: Tied, tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in tied.state_dict().items()}
    state["head.weight"] += 1
    save_file(state, tmp_path / "untied.safetensors")
    with pytest.raises(luna_broker.InvalidTensor, match="embed.weight and head.weight"):
        load_attached(empty(), tmp_path / "untied.safetensors", client=client)
    module = empty()
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    load_attached(module, tmp_path / "untied.safetensors", client=client)
    assert torch.equal(module.head.weight, module.embed.weight + 1)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_submodule_under_two_names_is_one(client: Any, tmp_path: Path, name: str) -> None:
    shared = nn.Linear(3, 3)
    module = nn.ModuleDict({"one": shared, "two": shared})
    save_file({f"{name}.weight": torch.eye(3), f"{name}.bias": torch.ones(3)}, tmp_path / "one.safetensors")
    load_attached(module, tmp_path / "one.safetensors", client=client)
    assert module["two"] is module["one"]
    assert torch.equal(module["two"].weight, torch.eye(3))


def test_the_broker_converts_what_the_module_wants_otherwise(client: Any, tied: Tied, file: Path) -> None:
    module = empty().to(torch.float16)
    load_attached(module, file, client=client, dtype=torch.float16)
    assert torch.equal(module.inner[0].weight, tied.inner[0].weight.to(torch.float16))


def test_a_prefix_picks_a_module_s_part_of_a_checkpoint(client: Any, tied: Tied, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    own = {f"model.tied.{key}": tensor.clone() for key, tensor in tied.state_dict().items()}
    save_file({**own, "vae.weight": torch.zeros(2)}, path)
    with pytest.raises(luna_broker.InvalidTensor, match="prefix='model.tied.' fits"):
        load_attached(empty(), path, client=client)
    module = empty()
    load_attached(module, path, client=client, prefix="model.tied.")
    assert torch.equal(module(TOKENS), tied(TOKENS))


def test_one_set_of_weights_serves_many_modules(client: Any, tied: Tied, file: Path) -> None:
    weights = client.attach(file)
    modules = [empty(), empty()]
    for module in modules:
        assert load_attached(module, weights) is weights
        assert attached_weights(module) == [weights]
        assert torch.equal(module(TOKENS), tied(TOKENS))
    assert modules[0].embed.weight.data_ptr() == modules[1].embed.weight.data_ptr()
    with pytest.raises(TypeError, match="attached already"):
        load_attached(empty(), weights, dtype=torch.float16)


def halved(module: Tied) -> Tied:
    return module.to(torch.float16)


def half_shaped(module: Tied) -> Tied:
    return Tied(3)


def with_more(module: Tied) -> Tied:
    module.extra = nn.Linear(2, 2, device="meta")
    return module


def with_less(module: Tied) -> Tied:
    del module.inner[1]
    return module


def wholly_on_meta(module: Tied) -> Tied:
    with torch.device("meta"):
        return Tied()


def without_shape(module: Tied) -> Tied:
    module.inner[0] = nn.LazyLinear(6)
    return module


REFUSED: list[Any] = [
    pytest.param(halved, "float16 in the module, torch.float32 attached", "dtype=", id="element type"),
    pytest.param(half_shaped, r"\[10, 3\] in the module, \[10, 6\] attached", "configuration", id="shape"),
    pytest.param(with_more, "the weights lack extra.weight, extra.bias", "strict=False", id="missing"),
    pytest.param(with_less, "the module lacks inner.1", "strict=False", id="unexpected"),
    pytest.param(wholly_on_meta, "meta device: ids", "skeleton", id="computed buffer on meta"),
    pytest.param(without_shape, "no shape is known", "configuration", id="lazy"),
]


@pytest.mark.parametrize(("change", "what", "remedy"), REFUSED)
def test_what_does_not_fit_is_refused_and_the_module_left_alone(
    client: Any, file: Path, change: Callable[[Tied], Tied], what: str, remedy: str
) -> None:
    module = change(Tied())
    before = {name: id(tensor) for name, tensor in module.named_parameters(remove_duplicate=False)}
    with pytest.raises(luna_broker.InvalidTensor, match=what) as refused:
        load_attached(module, file, client=client)
    assert remedy in refused.value.remedy
    assert refused.value.kind == "InvalidTensor"
    assert {name: id(tensor) for name, tensor in module.named_parameters(remove_duplicate=False)} == before
    assert attached_weights(module) == []
    # Nobody holds the weights for a module that does not have them.
    del refused
    gc.collect()
    client.unload(file)


def test_both_remedies_for_element_types_are_named_and_work(client: Any, file: Path) -> None:
    with pytest.raises(luna_broker.InvalidTensor) as refused:
        load_attached(empty(), file, client=client, dtype=torch.bfloat16)
    assert "dtype=" in refused.value.remedy
    assert "module.to(dtype)" in refused.value.remedy
    load_attached(empty().to(torch.bfloat16), file, client=client, dtype=torch.bfloat16)
    load_attached(empty(), file, client=client, dtype=torch.float32)


def test_leniently_what_only_one_has_is_left_alone_unless_on_meta(client: Any, tied: Tied, tmp_path: Path) -> None:
    path = write(tied, tmp_path / "part.safetensors", leave_out="inner.0.bias")
    module = Tied().eval()
    bias = module.inner[0].bias
    load_attached(module, path, client=client, strict=False)
    assert module.inner[0].bias is bias
    assert torch.equal(module.embed.weight, tied.embed.weight)
    with pytest.raises(luna_broker.InvalidTensor, match="meta device: inner.0.bias"):
        load_attached(empty(), path, client=client, strict=False)
    del module.inner[1]
    load_attached(module, path, client=client, strict=False)


def test_a_module_that_copies_what_it_is_given_is_found_out(client: Any, tmp_path: Path) -> None:
    class Hoarder(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, nn.Parameter(value.clone()) if isinstance(value, nn.Parameter) else value)

    path = write(nn.Linear(2, 2), tmp_path / "linear.safetensors")
    module = Hoarder(2, 2)
    weight, bias = module.weight, module.bias
    with pytest.raises(luna_broker.LunaBrokerError, match="made copies .*weight, bias") as refused:
        load_attached(module, path, client=client)
    assert module.weight is weight
    assert module.bias is bias
    assert weight.requires_grad
    assert not module._forward_pre_hooks
    assert attached_weights(module) == []
    del refused
    gc.collect()
    client.unload(path)


def test_a_module_that_refuses_what_it_is_given_has_its_own_again(client: Any, tied: Tied, file: Path) -> None:
    class Picky(nn.LayerNorm):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "bias" and isinstance(value, nn.Parameter) and hasattr(self, "bias"):
                raise RuntimeError("no other bias")
            super().__setattr__(name, value)

    module = Tied().eval()
    module.inner[1] = Picky(6)
    before = module.state_dict(keep_vars=True)
    with pytest.raises(RuntimeError, match="no other bias"):
        load_attached(module, file, client=client)
    after = module.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert module.head.weight is module.embed.weight
    assert not module._forward_pre_hooks
    assert attached_weights(module) == []


def test_a_recurrent_module_computes_with_its_own_again(client: Any, tmp_path: Path) -> None:
    class Picky(nn.LSTM):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "bias_hh_l0" and hasattr(self, name):
                raise RuntimeError("no other bias")
            super().__setattr__(name, value)

    path = write(nn.LSTM(3, 4), tmp_path / "lstm.safetensors")
    module = Picky(3, 4)
    expected = module(torch.ones(2, 1, 3))[0]
    with pytest.raises(RuntimeError, match="no other bias"):
        load_attached(module, path, client=client)
    assert torch.equal(module(torch.ones(2, 1, 3))[0], expected)


def test_recurrent_modules_use_what_they_were_given(client: Any, tmp_path: Path) -> None:
    private = nn.LSTM(3, 4)
    path = write(private, tmp_path / "lstm.safetensors")
    module = nn.LSTM(3, 4)
    load_attached(module, path, client=client)
    assert torch.equal(module(torch.ones(2, 1, 3))[0], private(torch.ones(2, 1, 3))[0])
