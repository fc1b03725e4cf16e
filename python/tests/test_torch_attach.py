"""Modules on attached weights compute what they compute on their own, and nothing is copied without a word."""

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
from safetensors.torch import load_file, save_file
from torch import nn


class Tied(nn.Module):
    """Embedding and head share their weight, and a buffer is in no file."""

    ids: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(10), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(self.ids[tokens])) * self.scale)


TOKENS = torch.tensor([[1, 2, 3]])


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
    )
    return CLIPTextModel(config).eval()


def tied_text_model() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def run_unet(module: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return module(latent, 7, context).sample


def run_text_encoder(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(12).reshape(2, 6)).last_hidden_state


def run_tied_text_model(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


REAL = [
    pytest.param(unet, run_unet, id="UNet2DConditionModel"),
    pytest.param(text_encoder, run_text_encoder, id="CLIPTextModel"),
    pytest.param(tied_text_model, run_tied_text_model, id="T5ForConditionalGeneration"),
]


def write(module: nn.Module, path: Path, leave_out: str | None = None) -> Path:
    """What a library saves: each parameter once, under the first of its names."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name != leave_out:
            tensors[name] = tensor.detach().contiguous()
        seen.add(id(tensor))
    save_file(tensors, path)
    return path


def private_bytes(module: nn.Module, weights: luna_broker.Weights) -> int:
    start, end = weights._held().span
    tensors = [*module.parameters(), *module.state_dict().values()]
    return sum(tensor.nbytes for tensor in tensors if not start <= tensor.data_ptr() < end)


@pytest.fixture
def tied() -> Tied:
    torch.manual_seed(2)
    return Tied().eval()


@pytest.fixture
def file(tied: Tied, tmp_path: Path) -> Path:
    return write(tied, tmp_path / "tied.safetensors")


def empty() -> Tied:
    with skeleton():
        return Tied().eval()


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
from luna_broker import torch as attached
from torch import nn

def load():
    module = nn.Linear(6, 6)
    attached.load_attached(module, sys.argv[1], prefix="inner.0.", strict=False)
    return module, attached._DEFAULT_CLIENTS[os.getpid(), os.environ["LUNA_BROKER"]]

module, client = load()
child = os.fork()
if not child:
    _, own = load()
    os._exit(0 if own.session.name != client.session.name else 3)
assert os.waitpid(child, 0)[1] == 0
attached.attached_weights(module)[0].check()
assert load()[1] is client
"""
    ended = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


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


def test_recurrent_modules_use_what_they_were_given(client: Any, tmp_path: Path) -> None:
    private = nn.LSTM(3, 4)
    path = write(private, tmp_path / "lstm.safetensors")
    module = nn.LSTM(3, 4)
    load_attached(module, path, client=client)
    assert torch.equal(module(torch.ones(2, 1, 3))[0], private(torch.ones(2, 1, 3))[0])


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
