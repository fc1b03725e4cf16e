"""What remote models send for ComfyUI's patches, and what they refuse: logic that needs none of its code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from luna_broker import Unsupported
from luna_broker.comfyui.remote import origins, patches, refusals
from luna_broker.comfyui.remote.patches import Adapter, Patch, Weights
from luna_broker.comfyui.remote.uploads import Uploads
from safetensors.torch import load_file, save_file

LAYER = "diffusion_model.middle_block.0.in_layers.2"
KEY = f"{LAYER}.weight"
SIDE = 4


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (SIDE, SIDE)))


def patch(value: Any, strength: float = 1.0, strength_model: float = 1.0, offset: Any = None) -> Patch:
    return (strength, value, strength_model, offset, None)


def adapter(name: str, *weights: Any) -> Any:
    return SimpleNamespace(name=name, weights=weights)


def lora(alpha: float | None = 2.0) -> Any:
    return adapter("lora", tensor(SIDE, 2), tensor(2, SIDE), alpha, None, None, None)


ORIGINAL = torch.ones(SIDE, SIDE)


def merge(wanted: Any, original: torch.Tensor, key: str) -> torch.Tensor:
    """Enough of what ComfyUI does to tell that it was asked."""
    result = original.clone()
    for strength, value, strength_model, _, _ in wanted:
        result = result * strength_model
        if isinstance(value, list):
            result = result + strength * value[0][0]
    return result


WEIGHTS = Weights(lambda key: ORIGINAL.shape, lambda key: ORIGINAL, merge)


def sent(of_model: dict[str, list[Patch]]) -> list[Adapter]:
    return patches.adapters(of_model, WEIGHTS)


def suffixes(made: Adapter, layer: str = LAYER) -> set[str]:
    return {key.removeprefix(f"{layer}.") for key in made.tensors}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lora(), {"lora_up.weight", "lora_down.weight", "alpha"}),
        (lora(None), {"lora_up.weight", "lora_down.weight"}),
        (
            adapter("lora", tensor(), tensor(), None, tensor(), tensor(), None),
            {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "dora_scale"},
        ),
        (
            adapter("loha", tensor(), tensor(), 1.0, tensor(), tensor(), None, None, None),
            {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        ),
        (
            adapter("lokr", tensor(), None, 1.0, None, None, tensor(), tensor(), tensor(), None),
            {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"},
        ),
        (
            adapter("glora", tensor(), tensor(), tensor(), tensor(), 1.0, None),
            {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
        ),
        # ComfyUI ignores the rescale of an OFT; the broker would not.
        (adapter("oft", tensor(1, SIDE, SIDE), tensor(SIDE), 0.5, None), {"oft_blocks", "alpha"}),
        (adapter("boft", tensor(1, 1, SIDE, SIDE), tensor(SIDE), 0.5, None), {"oft_blocks", "rescale", "alpha"}),
        ((tensor(),), {"diff"}),
        (("diff", (tensor(),)), {"diff"}),
        (("set", (tensor(),)), {"set_weight"}),
    ],
)
def test_every_kind_is_sent_under_keys_of_the_brokers(value: Any, expected: set[str]) -> None:
    (made,) = sent({KEY: [patch(value, 0.5)]})
    assert suffixes(made) == expected


def test_layers_of_text_encoders_have_the_names_they_have_in_adapters() -> None:
    (made,) = sent({"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": [patch(lora())]})
    assert all(key.startswith("text_encoders.clip_l.transformer.text_model.encoder.") for key in made.tensors)


def test_patches_of_a_layer_keep_their_order_and_strengths() -> None:
    first, second, third = lora(), adapter("glora", *(tensor() for _ in range(4)), None, None), lora()
    other = f"{LAYER}x.weight"
    late = lora()
    made = sent(
        {
            KEY: [patch(first, 0.5), patch(second, 0.7), patch(third, 0.5)],
            # The first adapter has room for the second of these, but it comes before the one of the first.
            other: [patch(lora(), 0.7), patch(late, 0.5)],
        }
    )
    assert [each.strength for each in made] == [0.5, 0.7, 0.5]
    assert made[0].tensors[f"{LAYER}.lora_up.weight"] is first.weights[0]
    assert made[1].tensors[f"{LAYER}.a1.weight"] is second.weights[0]
    assert made[2].tensors[f"{LAYER}.lora_up.weight"] is third.weights[0]
    assert f"{LAYER}x.lora_up.weight" in made[1].tensors, "two layers that go together were sent apart"
    assert made[2].tensors[f"{LAYER}x.lora_up.weight"] is late.weights[0]


def test_a_bias_goes_with_the_weight() -> None:
    bias = Weights(lambda key: torch.Size([SIDE]), lambda key: torch.ones(SIDE), merge)
    (made,) = patches.adapters({KEY: [patch(lora(), 0.5)], f"{LAYER}.bias": [patch((tensor(SIDE),), 0.5)]}, bias)
    assert suffixes(made) == {"lora_up.weight", "lora_down.weight", "alpha", "diff_b"}


@pytest.mark.parametrize("value", [lora(), (tensor(),), adapter("oft", tensor(1, SIDE, SIDE), None, None, None)])
def test_what_has_no_strength_is_not_sent(value: Any) -> None:
    assert sent({KEY: [patch(value, 0.0)]}) == []


def test_a_set_weight_counts_whatever_its_strength() -> None:
    (made,) = sent({KEY: [patch(("set", (tensor(),)), 0.3)]})
    assert made.strength == 1.0


def test_a_difference_of_another_shape_is_left_out_as_comfyui_does() -> None:
    assert sent({KEY: [patch((tensor(SIDE, SIDE + 1),))]}) == []


def test_what_the_broker_has_no_adapter_for_is_merged_here() -> None:
    half = [(torch.full((SIDE, SIDE), 3.0), None)]
    (made,) = sent({KEY: [patch(half, strength=0.4, strength_model=0.6)]})
    assert made.strength == 1.0
    assert torch.allclose(made.tensors[f"{LAYER}.set_weight"], ORIGINAL * 0.6 + 3.0 * 0.4)
    (made,) = sent({KEY: [patch((None,), strength=0.0, strength_model=1.5)]})
    assert torch.allclose(made.tensors[f"{LAYER}.set_weight"], ORIGINAL * 1.5)
    (made,) = sent({f"{LAYER}.bias": [patch((None,), strength=0.0, strength_model=1.5)]})
    assert torch.allclose(made.tensors[f"{LAYER}.diff_b"], ORIGINAL * 0.5)


def test_what_is_no_layers_weight_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="logit_scale.*attached"):
        sent({"clip_l.logit_scale": [patch((tensor(),))]})


def test_equal_sets_are_uploaded_once() -> None:
    published = []
    client = SimpleNamespace(publish=lambda name, tensors: published.append(name) or tensors)
    uploads = Uploads(client)  # type: ignore[arg-type]
    value = tensor()
    name = uploads.publish({"layer.diff": value})
    assert uploads.publish({"layer.diff": value.clone()}) == name
    assert published == [name]
    for other in ({"layer.diff": value + 1}, {"layes.diff": value}, {"layer.diff": value.reshape(2, 8)}):
        assert uploads.publish(other) != name
    uploads.forget()
    assert uploads.publish({"layer.diff": value}) == name
    assert published.count(name) == 2, "a broker that was restarted was not sent it again"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    halves = {"lora_up.weight": tensor(SIDE, 2), "lora_down.weight": tensor(2, SIDE), "alpha": torch.tensor(2.0)}
    unet = {f"lora_unet_mid.{key}": value.half() for key, value in halves.items()}
    save_file({**unet, "lora_te_x.lora_up.weight": tensor(SIDE, 2)}, path)
    return path


def loaded(path: Path, strength: float = 0.8) -> dict[str, list[Patch]]:
    """A LoRA as ComfyUI keeps it."""
    tensors = load_file(path)
    origins.remember(path, tensors)
    up, down, alpha = (tensors[f"lora_unet_mid.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    return {KEY: [patch(adapter("lora", up, down, alpha.item(), None, None, None), strength)]}


def test_tensors_that_come_unchanged_from_one_file_are_sent_as_its_name(file: Path) -> None:
    (made,) = sent(loaded(file))
    assert origins.file_of(made.tensors) == str(file)
    assert origins.of(made.tensors) == str(file)


def test_a_file_that_says_otherwise_is_not_named(file: Path) -> None:
    copied = loaded(file)
    value = copied[KEY][0][1]
    value.weights = (value.weights[0].clone(), *value.weights[1:])
    (made,) = sent(copied)
    assert origins.file_of(made.tensors) is None, "one tensor is another"
    rescaled = loaded(file)
    value = rescaled[KEY][0][1]
    value.weights = (*value.weights[:2], 1.0, *value.weights[3:])
    (made,) = sent(rescaled)
    assert origins.file_of(made.tensors) is None, "alpha is another"
    (made,) = sent(loaded(file))
    part = {key: value for key, value in made.tensors.items() if "down" not in key}
    assert origins.file_of(part) is None, "the file has more"
    tensors = load_file(file)
    save_file({**tensors, "lora_unet_out.diff": tensor()}, file)
    assert origins.file_of(made.tensors) is None, "the file was changed since"


def test_files_of_equal_strength_stay_apart(file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    second.write_bytes(file.read_bytes())
    one, other = loaded(file), loaded(second)
    made = sent({KEY: one[KEY], f"{LAYER}x.weight": other[KEY]})
    assert [origins.file_of(each.tensors) for each in made] == [str(file), str(second)]


class Node:
    """Stands for a node that patches."""

    def patch(self) -> Any:
        def replace(*arguments: Any) -> None: ...

        return replace


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"patches": {"attn1_patch": [Node().patch()]}}, "attn1_patch"),
        ({"patches": {"output_block_patch": [Node().patch()], "attn2_patch": []}}, "output_block_patch"),
        ({"patches_replace": {"attn1": {("middle", 0, 0): Node().patch()}}}, "attn1"),
        ({"optimized_attention_override": Node().patch()}, "optimized_attention_override"),
    ],
)
def test_patches_within_the_network_are_refused_by_name_with_the_way_out(options: Any, name: str) -> None:
    with pytest.raises(Unsupported) as refused:
        refusals.options(options)
    for word in (name, "Node", "attached"):
        assert word in str(refused.value)


def test_what_only_goes_along_is_not_refused() -> None:
    refusals.options({"patches": {"attn1_patch": []}, "patches_replace": {"attn1": {}}, "easycache": object()})


def patcher(**changed: Any) -> Any:
    plain = {"object_patches": {}, "wrappers": {}, "weight_wrapper_patches": {}, "injections": {}}
    return SimpleNamespace(**{**plain, **changed})


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"object_patches": {"diffusion_model": torch.nn.Identity()}}, "diffusion_model"),
        ({"object_patches": {"diffusion_model.out": torch.nn.Identity()}}, "diffusion_model.out"),
        ({"wrappers": {"apply_model": {"torch.compile": [Node().patch()]}}}, "torch.compile"),
        ({"weight_wrapper_patches": {KEY: [Node().patch()]}}, KEY),
        ({"injections": {"animatediff": [Node().patch()]}}, "animatediff"),
    ],
)
def test_a_patcher_that_rewires_the_network_is_refused_by_name(changed: Any, name: str) -> None:
    refusals.patcher(patcher(object_patches={"model_sampling": object()}))
    with pytest.raises(Unsupported) as refused:
        refusals.patcher(patcher(**changed))
    assert name in str(refused.value) and "attached" in str(refused.value)
