"""What a ComfyUI of another version lacks is found out before it is relied on. Needs no ComfyUI."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from luna_broker.comfyui import compat


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("inside")

    class Thing:
        def call(self, one: int, two: int = 2) -> None: ...

    module.Thing = Thing
    monkeypatch.setitem(sys.modules, "inside", module)
    return module


@pytest.mark.parametrize(
    ("attribute", "parameters", "is_there"),
    [
        ("Thing", None, True),
        ("Thing.call", None, True),
        ("Thing.call", ("self", "one", "two"), True),
        ("Thing.call", ("two",), True),
        ("Thing.call", ("three",), False),
        ("Thing.other", None, False),
        ("Other", None, False),
        ("Other.call", ("one",), False),
    ],
)
def test_attributes_and_their_parameters_are_looked_at(
    inside: Any, attribute: str, parameters: tuple[str, ...] | None, is_there: bool
) -> None:
    assert compat.look((("inside", attribute, parameters),)) == ([] if is_there else [f"inside.{attribute}"])


def test_a_module_that_is_not_there_lacks_everything() -> None:
    assert compat.look((("no_such_module", "Thing", None),)) == ["no_such_module.Thing"]


def test_outside_comfyui_everything_is_missing() -> None:
    assert compat.version() is None
    assert "comfy.model_patcher.ModelPatcher" in compat.missing("attached")


def test_without_comfyui_the_pack_has_no_nodes_and_a_folder_for_the_browser() -> None:
    import luna_broker.comfyui as pack

    assert pack.NODE_CLASS_MAPPINGS == {} == pack.NODE_DISPLAY_NAME_MAPPINGS
    assert pack.WEB_DIRECTORY.endswith("luna_broker/comfyui/web")
    with pytest.raises(AttributeError, match="comfy_entrypoint"):
        _ = pack.comfy_entrypoint
