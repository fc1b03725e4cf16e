"""What a set of merged weights is named by, and that workers share it. The patches are stand-ins; needs no ComfyUI."""

from __future__ import annotations

from typing import Any

import luna_broker
import pytest
import torch
from luna_broker.comfyui.attached.merged import MergedSets, NotShared, name_of


class Adapter:
    """What ComfyUI makes of a LoRA's layer, as far as its name and tensors go."""

    def __init__(self, *weights: Any) -> None:
        self.weights = weights

    def calculate_weight(self) -> None: ...


class OtherAdapter(Adapter):
    pass


def patches(adapter: Any = None, strength: float = 0.8, strength_model: float = 1.0, **more: Any) -> dict[str, Any]:
    up = torch.arange(6, dtype=torch.float16).reshape(3, 2)
    value = adapter or Adapter(up, up + 1, 4.0, None)
    return {"layer.weight": [(strength, value, strength_model, more.get("offset"), more.get("function"))]}


def name(given: dict[str, Any], base: str = "base", computed_by: str = "torch 2.11") -> str:
    return name_of(base, given, computed_by)


def test_the_same_patches_have_the_same_name() -> None:
    assert name(patches()) == name(patches())


def test_whatever_bytes_depend_on_makes_another_name() -> None:
    up = torch.arange(6, dtype=torch.float16).reshape(3, 2)
    one = patches()
    others = [
        patches(strength=0.7),
        patches(strength_model=0.5),
        patches(offset=(0, 0, 1)),
        patches(Adapter(up, up + 1, 5.0, None)),
        patches(Adapter(up, up + 1, None, 4.0)),
        patches(Adapter(up, up + 2, 4.0, None)),
        patches(Adapter(up.float(), up + 1, 4.0, None)),
        patches(Adapter(up.reshape(2, 3), up + 1, 4.0, None)),
        patches(OtherAdapter(up, up + 1, 4.0, None)),
        patches(("diff", (up,))),
        patches(("set", (up,))),
        {"other.weight": one["layer.weight"]},
        {"layer.weight": one["layer.weight"] * 2},
    ]
    names = {name(each) for each in [one, *others]} | {name(one, base="other"), name(one, computed_by="torch 2.12")}
    assert len(names) == 1 + len(others) + 2


def test_the_order_of_patches_counts_and_that_of_keys_does_not() -> None:
    first, second = patches()["layer.weight"][0], patches(strength=0.2)["layer.weight"][0]
    assert name({"a": [first, second]}) != name({"a": [second, first]})
    assert name({"a": [first], "b": [second]}) == name({"b": [second], "a": [first]})
    assert name({"a": [first], "b": [second]}) != name({"a": [second], "b": [first]})


def test_values_do_not_run_into_each_other() -> None:
    assert name(patches(("diff", ("ab", "c")))) != name(patches(("diff", ("a", "bc"))))
    assert name(patches(("diff", (1, 0)))) != name(patches(("diff", (True, 0))))
    assert name(patches(("diff", (("a",), "b")))) != name(patches(("diff", ("a", ("b",)))))


@pytest.mark.parametrize(
    "unnamed", [patches(function=lambda weight: weight), patches([torch.zeros(1)]), patches(("diff", (object(),)))]
)
def test_what_nobody_could_name_is_not_shared(unnamed: dict[str, Any]) -> None:
    with pytest.raises(NotShared):
        name(unnamed)


def sets(client: Any, base: str = "base") -> MergedSets:
    return MergedSets(client, base, torch.device("cpu"), "a test")


def test_one_worker_merges_and_the_others_take_it(broker: Any) -> None:
    merged = {"layer.weight": torch.rand(3, 2)}
    with luna_broker.connect(broker.address) as one, luna_broker.connect(broker.address) as other:
        assert sets(one).find(patches(), 1) == {}
        views = sets(one).publish(merged, patches(), 1)
        assert torch.equal(views["layer.weight"], merged["layer.weight"])
        found = sets(other).find(patches(), 7)
        assert torch.equal(found["layer.weight"], merged["layer.weight"])
        assert sets(other).find(patches(strength=0.1), 8) == {}
        assert sets(other, base="another file").find(patches(), 9) == {}


def test_two_that_merge_at_a_time_share_too(broker: Any) -> None:
    merged = {"layer.weight": torch.rand(3, 2)}
    with luna_broker.connect(broker.address) as one, luna_broker.connect(broker.address) as other:
        views = [sets(client, "race").publish(merged, patches(), 1) for client in (one, other)]
        assert all(torch.equal(each["layer.weight"], merged["layer.weight"]) for each in views)
        (entry,) = [each for each in one.status()["weights"] if name(patches(), "race", "a test") in each["names"]]
        assert len(entry["holders"]) == 2


def test_without_a_broker_a_worker_keeps_what_it_merged(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client:
        own = sets(client)
        broker.kill()
        assert own.find(patches(), 1) == {}
        assert own.publish({"layer.weight": torch.rand(3, 2)}, patches(), 1) == {}


def test_what_cannot_be_named_is_not_published(client: Any) -> None:
    own = sets(client)
    unnamed = patches(function=lambda weight: weight)
    assert own.find(unnamed, 1) == {} == own.publish({"layer.weight": torch.rand(3, 2)}, unnamed, 1)
