"""What the loaders ask for, and what they make of it. What loads is a stand-in; needs no ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from luna_broker.comfyui import brokers, files, loading
from luna_broker.comfyui.choice import Choice, Mode
from luna_broker.comfyui.loaded import Loaded
from luna_broker.comfyui.nodes.loaders import NODE_CLASS_MAPPINGS

LOADERS = sorted(NODE_CLASS_MAPPINGS)
NAMES = {
    "LunaBrokerCheckpointLoader": "ckpt_name",
    "LunaBrokerUNETLoader": "unet_name",
    "LunaBrokerCLIPLoader": "clip_name",
    "LunaBrokerVAELoader": "vae_name",
}
LOADED = Loaded(Choice(Mode.ATTACHED, "it suits"), "model", "clip", "vae")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What `loading.load` was called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*arguments: Any, **options: Any) -> Loaded:
        calls.append((arguments, options))
        return LOADED

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(files, "choices", lambda kind: [f"{kind}.safetensors"])
    monkeypatch.setattr(brokers, "generation", lambda address: f"life of {address}")
    return calls


@pytest.mark.parametrize("name", LOADERS)
def test_every_input_is_explained_and_the_usual_ones_are_there(name: str, asked: Any) -> None:
    inputs = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    assert [*inputs["required"]] == [NAMES[name]]
    assert {"mode", "on_failure", "broker"} <= set(inputs["optional"])
    for _, options in [*inputs["required"].values(), *inputs["optional"].values()]:
        assert options["tooltip"]
    assert inputs["optional"]["mode"][0] == ["auto", "attached", "remote", "local"]
    assert inputs["optional"]["on_failure"][0] == ["local", "error"]


@pytest.mark.parametrize("name", LOADERS)
def test_results_are_in_the_order_of_the_outputs_and_the_line_is_shown(name: str, asked: Any) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    given = {NAMES[name]: "a.safetensors", "mode": "remote", "on_failure": "error", "broker": "/a.sock", "node": "7"}
    told = node().load(**given)
    assert told["result"] == tuple(kind.lower() for kind in node.RETURN_TYPES)
    assert told["ui"] == {"text": ["attached: it suits"]}
    ((kind, names), options) = asked[0]
    assert (kind, names) == (node.KIND, ["a.safetensors"])
    assert options == {"node": "7", "mode": "remote", "on_failure": "error", "address": "/a.sock"}


def test_two_text_encoders_are_two_files_and_none_is_none(asked: Any) -> None:
    loader = NODE_CLASS_MAPPINGS["LunaBrokerCLIPLoader"]()
    loader.load(clip_name="g.safetensors", clip_name2="l.safetensors", type="sdxl")
    loader.load(clip_name="l.safetensors", clip_name2="none")
    assert [arguments[1] for arguments, _ in asked] == [["g.safetensors", "l.safetensors"], ["l.safetensors"]]
    assert asked[0][1]["type"] == "sdxl"


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_runs_again_when_its_broker_is_another(name: str, asked: Any) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    given = {NAMES[name]: "a.safetensors", "broker": "/a.sock"}
    assert node.IS_CHANGED(**given) == "life of /a.sock"
    assert node.IS_CHANGED(**given, mode="local") == ""
    # A name that another node gives is not known yet.
    assert node.IS_CHANGED(**{**given, NAMES[name]: None}) == "life of /a.sock"
    # Nor is anything else of another node's.
    assert node.IS_CHANGED(**{**given, "broker": None, "mode": None, "on_failure": None}) == "life of "


@pytest.mark.parametrize("name", LOADERS)
def test_any_name_is_taken_but_none(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    assert node.VALIDATE_INPUTS(**{NAMES[name]: "of another broker.safetensors"}) is True
    assert node.VALIDATE_INPUTS(**{NAMES[name]: None}) is True
    assert node.VALIDATE_INPUTS(**{NAMES[name]: " "}) != True  # noqa: E712
