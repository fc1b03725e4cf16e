"""How long modules hold attached weights, and when they are told that they hold them no more."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from luna_broker.torch import attached_weights, load_attached, skeleton
from modules import (
    TOKENS,
    Tied,
    empty,
    private_bytes,
    write,
)
from safetensors.torch import save_file
from torch import nn


@pytest.fixture
def by_default(start_broker: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A broker at the default address, whose sessions are those of the test."""
    broker = start_broker()
    monkeypatch.setenv("LUNA_BROKER", broker.address)
    return broker


def sessions(broker: Any) -> set[str]:
    with luna_broker.connect(broker.address, name="asks") as client:
        return {session["name"] for session in client.status()["sessions"]} - {"asks"}


def default_client(broker: Any) -> Any:
    return luna_broker.torch._DEFAULT_CLIENTS[os.getpid(), broker.address]


def test_calls_without_a_client_share_one(by_default: Any, tied: Tied, file: Path) -> None:
    before = sessions(by_default)
    modules = [empty() for _ in range(3)]
    for module in modules:
        load_attached(module, file)
        assert torch.equal(module(TOKENS), tied(TOKENS))
    assert len(sessions(by_default) - before) == 1


def test_a_default_client_that_was_closed_is_replaced(by_default: Any, tied: Tied, file: Path) -> None:
    first, second = empty(), empty()
    load_attached(first, file)
    closed = default_client(by_default)
    closed.close()
    load_attached(second, file)
    assert default_client(by_default) is not closed
    assert torch.equal(second(TOKENS), tied(TOKENS))


def test_the_default_client_outlives_its_broker_and_says_when_nobody_is_there(
    by_default: Any, tied: Tied, file: Path
) -> None:
    load_attached(empty(), file)
    by_default.kill()
    with pytest.raises(luna_broker.ConnectionLost):
        load_attached(empty(), file)
    by_default.start()
    module = empty()
    load_attached(module, file)
    assert torch.equal(module(TOKENS), tied(TOKENS))


def test_a_forked_child_makes_a_default_client_of_its_own(by_default: Any, file: Path) -> None:
    program = """
import os, sys
from luna_broker import ConnectionLost
from luna_broker import torch as attached
from torch import nn

def load():
    module = nn.Linear(6, 6)
    attached.load_attached(module, sys.argv[1], prefix="inner.0.", strict=False)
    return module, attached._DEFAULT_CLIENTS[os.getpid(), os.environ["LUNA_BROKER"]]

def is_refused(call):
    try:
        call()
    except ConnectionLost:
        return True

module, client = load()
[weights] = attached.attached_weights(module)
child = os.fork()
if not child:
    refused = [is_refused(call) for call in (client.ping, weights.check, weights.reattach)]
    _, own = load()
    os._exit(0 if all(refused) and own.session.name != client.session.name else 3)
assert os.waitpid(child, 0)[1] == 0
attached.attached_weights(module)[0].check()
assert load()[1] is client
"""
    ended = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_forward_after_the_broker_s_death_is_an_error_until_it_is_back(
    start_broker: Any, tied: Tied, file: Path
) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        module = empty()
        weights = load_attached(module, file, client=client)
        expected, address = module(TOKENS), module.embed.weight.data_ptr()
        assert torch.equal(expected, tied(TOKENS))
        broker.kill()
        with pytest.raises(luna_broker.ConnectionLost):
            module(TOKENS)
        # The memory is there all the same.
        assert torch.equal(module.inner(module.embed(TOKENS)), tied.inner(tied.embed(TOKENS)))
        broker.start()
        with pytest.raises(luna_broker.ConnectionLost):
            module(TOKENS)
        weights.reattach()
        assert torch.equal(module(TOKENS), expected)
        assert module.embed.weight.data_ptr() == address


def test_a_forward_after_unloading_by_force_is_an_error_until_reattached(client: Any, tied: Tied, file: Path) -> None:
    module = empty()
    weights = load_attached(module, file, client=client)
    client.unload(file, force=True)
    with pytest.raises(luna_broker.Stale):
        module(TOKENS)
    weights.reattach()
    assert torch.equal(module(TOKENS), tied(TOKENS))


def test_unchecked_modules_go_on_without_a_broker(start_broker: Any, tied: Tied, file: Path) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        module = empty()
        load_attached(module, file, client=client, check=False)
        broker.kill()
        assert torch.equal(module(TOKENS), tied(TOKENS))


def test_the_module_keeps_its_weights_held_and_no_longer(client: Any, file: Path) -> None:
    def held() -> bool:
        sets = [report for report in client.status()["weights"] if str(file) in report["names"]]
        return any(report["holders"] for report in sets)

    module = empty()
    load_attached(module, file, client=client)
    gc.collect()
    assert held()
    # Closing drops the dictionary's tensors, which are not the module's.
    attached_weights(module)[0].close()
    module(TOKENS)
    assert held()
    del module
    gc.collect()
    assert not held()


def of_other_type(module: nn.Module) -> None:
    module.half()


def replaced(module: nn.Module) -> None:
    own = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in module.named_parameters()}
    own = {**own, **{name: tensor.clone() for name, tensor in module.named_buffers()}}
    module.load_state_dict(own, strict=False, assign=True)
    module.head.weight = module.embed.weight


@pytest.mark.parametrize("change", [of_other_type, replaced])
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "forward"])
def test_weights_that_the_module_gave_up_are_neither_checked_nor_held(
    client: Any, file: Path, change: Callable[[nn.Module], None], asked: bool
) -> None:
    module = empty()
    load_attached(module, file, client=client)
    change(module)
    if asked:
        assert attached_weights(module) == []
    else:
        module(TOKENS)
    gc.collect()
    # Nobody is told that somebody uses them.
    client.unload(file)
    module(TOKENS)
    assert attached_weights(module) == []
    assert not module._forward_pre_hooks


def test_one_tensor_that_is_left_is_checked_yet(client: Any, file: Path) -> None:
    module = empty()
    weights = load_attached(module, file, client=client)
    module(TOKENS)
    module.embed = nn.Embedding(10, 6)
    module.head = nn.Linear(6, 10)
    module.inner[0] = nn.Linear(6, 6)
    module(TOKENS)
    assert attached_weights(module) == [weights]
    client.unload(file, force=True)
    with pytest.raises(luna_broker.Stale):
        module(TOKENS)


def test_tensors_that_are_lent_out_for_a_call_are_not_given_up(client: Any, file: Path) -> None:
    module = empty()
    weights = load_attached(module, file, client=client)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    own = {name: tensor.detach().clone() for name, tensor in tensors}
    torch.func.functional_call(module, own, (TOKENS,))
    assert attached_weights(module) == [weights]
    client.unload(file, force=True)
    torch.func.functional_call(module, own, (TOKENS,))
    with pytest.raises(luna_broker.Stale):
        module(TOKENS)


def test_weights_given_anew_replace_the_old_ones_and_their_check(client: Any, tied: Tied, file: Path) -> None:
    module = empty()
    load_attached(module, file, client=client)
    client.unload(file, force=True)
    attached_weights(module)[0].close()
    with torch.no_grad():
        tied.embed.weight.add_(1)
    other = write(tied, file.with_name("other.safetensors"))
    with luna_broker.connect(client_address(client)) as fresh:
        load_attached(module, other, client=fresh)
        assert torch.equal(module(TOKENS), tied(TOKENS))
        assert len(attached_weights(module)) == 1


def client_address(client: Any) -> str:
    return str(client.status()["address"])


def test_parts_from_several_files_are_all_checked(client: Any, broker: Any, tied: Tied, tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in tied.state_dict().items() if key != "head.weight"}
    halves = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file({key: tensor for key, tensor in state.items() if key.startswith("inner")}, halves[0])
    save_file({key: tensor for key, tensor in state.items() if not key.startswith("inner")}, halves[1])
    module = Tied().eval()
    with luna_broker.connect(broker.address) as first:
        load_attached(module, halves[0], client=first, strict=False)
        load_attached(module, halves[1], client=client, strict=False)
        assert len(attached_weights(module)) == 2
        assert torch.equal(module(TOKENS), tied(TOKENS))
        client.unload(halves[0], force=True)
        with pytest.raises(luna_broker.Stale, match="one.safetensors"):
            module(TOKENS)


def test_a_copied_or_saved_module_is_private_and_asks_nobody(start_broker: Any, tied: Tied, file: Path) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        module = empty()
        weights = load_attached(module, file, client=client)
        copied = copy.deepcopy(module)
        saved = io.BytesIO()
        torch.save(module, saved)
        broker.kill()
        saved.seek(0)
        for private in (copied, torch.load(saved, weights_only=False)):
            assert private_bytes(private, weights) > 0
            assert torch.equal(private(TOKENS), tied(TOKENS))
            assert private.head.weight is private.embed.weight


def test_a_skeleton_has_values_where_no_file_has_them(tied: Tied) -> None:
    module = empty()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.ids, tied.ids)
    assert not any(parameter.is_meta for parameter in Tied().parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_skeleton_keeps_tied_what_one_parameter_was_given_to() -> None:
    with skeleton():
        weight = nn.Parameter(torch.ones(3, 3))
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[0].weight = module[1].weight = weight
    assert module[0].weight is module[1].weight
    assert module[0].weight.is_meta
