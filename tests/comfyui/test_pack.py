"""What a user sees of the pack besides pictures: names, tooltips, help pages, example workflows, the sidebar."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

import pytest
from conftest import PACK
from workflows import Graph

PREFIX = "LunaBroker"
TESTS_PREFIX = "LunaBrokerTests"

IDS = {
    "LunaBrokerCheckpointLoader",
    "LunaBrokerUNETLoader",
    "LunaBrokerCLIPLoader",
    "LunaBrokerVAELoader",
    "LunaBrokerVAEEncode",
    "LunaBrokerVAEDecode",
    "LunaBrokerVAEEncodeTiled",
    "LunaBrokerVAEDecodeTiled",
    "LunaBrokerCLIPTextEncode",
    "LunaBrokerCLIPTextEncodeSDXL",
    "LunaBrokerCLIPTextEncodeDual",
    "LunaBrokerModelRouter",
    "LunaBrokerConfigGateway",
    "LunaBrokerStatus",
}


@pytest.fixture(scope="session")
def nodes(worker) -> dict[str, Any]:
    """All nodes of the ComfyUI, with their inputs."""
    return worker.nodes()


@pytest.fixture(scope="session")
def own(nodes) -> dict[str, Any]:
    return {name: node for name, node in nodes.items() if name.startswith(PREFIX) and TESTS_PREFIX not in name}


def page(worker, path: str) -> str:
    with urllib.request.urlopen(worker._url(path)) as answer:
        return answer.read().decode()


def test_all_nodes_are_there(own):
    assert set(own) == IDS
    assert {node["category"] for node in own.values()} == {"Luna Broker"}


def test_every_node_says_what_it_and_each_of_its_inputs_and_outputs_is(own):
    silent = []
    for name, node in own.items():
        if not node["description"] or not node["display_name"].endswith("(Luna Broker)"):
            silent.append(name)
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        silent += [f"{name}.{key}" for key, (_, options) in inputs.items() if not options.get("tooltip")]
        if len(node["output_tooltips"] or ()) != len(node["output"]):
            silent.append(f"{name}: outputs")
    assert silent == []


def test_every_node_has_a_help_page_that_names_its_inputs_and_no_page_is_about_another(own, worker):
    for name, node in own.items():
        help_page = page(worker, f"/extensions/luna-broker/docs/{name}.md")
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        unnamed = [key for key in inputs if f"`{key}`" not in help_page]
        assert unnamed == [], f"{name}: its page does not name {unnamed}"
    assert {path.stem for path in (PACK / "web" / "docs").glob("*.md")} == set(own)


def test_the_sidebar_is_loaded_by_the_browser(worker):
    scripts = json.loads(page(worker, "/extensions"))
    assert "/extensions/luna-broker/luna_broker.js" in scripts
    assert "registerSidebarTab" in page(worker, "/extensions/luna-broker/luna_broker.js")


def test_the_sidebar_is_told_what_the_broker_does(worker, broker):
    asked = urllib.parse.quote(broker.address)
    refused = json.loads(page(worker, "/luna_broker/status?broker=/run/of/somebody.sock"))
    assert refused["error"]["kind"] == "Refused"
    # A page may ask for what a node was given.
    graph = Graph()
    graph.add("LunaBrokerStatus", broker=broker.address)
    worker.run(graph)
    (told,) = json.loads(page(worker, f"/luna_broker/status?broker={asked}"))["brokers"]
    assert told["address"] == broker.address
    assert {lane["service"] for lane in told["lanes"]} == {"vae", "unet", "clip"}


def test_the_sidebar_is_told_that_there_is_no_broker(worker):
    answer = json.loads(page(worker, "/luna_broker/status"))
    assert answer["brokers"] == []
    assert "luna-broker serve" in answer["error"]["remedy"]


def examples() -> list[str]:
    return sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))


def test_there_are_example_workflows(worker):
    assert len(examples()) >= 3
    assert sorted(json.loads(page(worker, "/workflow_templates"))["luna-broker"]) == examples()


@pytest.mark.parametrize("name", examples())
def test_an_example_has_a_picture_and_only_nodes_that_there_are(name, nodes):
    picture = PACK / "example_workflows" / f"{name}.jpg"
    assert picture.read_bytes().startswith(b"\xff\xd8"), f"{picture} is no JPEG"
    assert picture.stat().st_size < 200_000
    workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
    unknown = {node["type"] for node in workflow["nodes"]} - set(nodes) - {"Note", "MarkdownNote"}
    assert unknown == set()
    # Of stock nodes the frontend invents inputs.
    for node in (node for node in workflow["nodes"] if node["type"].startswith(PREFIX)):
        definition = nodes[node["type"]]["input"]
        inputs = {**definition.get("required", {}), **definition.get("optional", {})}
        assert {given["name"] for given in node["inputs"]} == set(inputs), node["type"]
