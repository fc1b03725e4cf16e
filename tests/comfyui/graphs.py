"""What workflows are made of, and where their models come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

Link = list[Any]


class Graph(dict[str, Any]):
    """A workflow: nodes by id."""

    def add(self, kind: str, **inputs: Any) -> Node:
        name = str(len(self) + 1)
        self[name] = {"class_type": kind, "inputs": inputs}
        return Node(name)

    def only(self, kind: str) -> str:
        """Id of the only node of a kind."""
        (name,) = (name for name, node in self.items() if node["class_type"] == kind)
        return name


class Node(NamedTuple):
    """A node of a workflow; `node.out(1)` is its second output."""

    id: str

    def out(self, slot: int = 0) -> Link:
        return [self.id, slot]


class Models(NamedTuple):
    """What a checkpoint loader gives."""

    model: Link
    clip: Link
    vae: Link


@dataclass(frozen=True)
class Loaders:
    """Where a workflow's models come from: stock nodes, or the pack's in one of its modes."""

    mode: str | None = None
    broker: str = ""
    on_failure: str = "error"

    def checkpoint(self, graph: Graph, name: str) -> Models:
        if self.mode is None:
            loader = graph.add("CheckpointLoaderSimple", ckpt_name=name)
        else:
            loader = graph.add("LunaBrokerCheckpointLoader", ckpt_name=name, precision="auto", **self.choices())
        return Models(loader.out(0), loader.out(1), loader.out(2))

    def unet(self, graph: Graph, name: str) -> Link:
        if self.mode is None:
            return graph.add("UNETLoader", unet_name=name, weight_dtype="default").out()
        return graph.add("LunaBrokerUNETLoader", unet_name=name, precision="auto", **self.choices()).out()

    def clip(self, graph: Graph, name: str) -> Link:
        if self.mode is None:
            return graph.add("CLIPLoader", clip_name=name, type="stable_diffusion").out()
        return graph.add("LunaBrokerCLIPLoader", clip_name=name, type="stable_diffusion", **self.choices()).out()

    def vae(self, graph: Graph, name: str) -> Link:
        if self.mode is None:
            return graph.add("VAELoader", vae_name=name).out()
        return graph.add("LunaBrokerVAELoader", vae_name=name, **self.choices()).out()

    def choices(self) -> dict[str, str]:
        """The inputs that all of the pack's loaders have."""
        return {"mode": self.mode or "", "on_failure": self.on_failure, "broker": self.broker}


STOCK = Loaders()
