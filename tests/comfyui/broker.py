"""A real broker for ComfyUI's workers, and what its status says of the work it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import luna_broker
from broker_process import BrokerProcess

from memory import MIB

SERVICES = ("vae", "clip", "unet")


def start(binary: Path, socket: Path, models: Path, *options: str) -> BrokerProcess:
    """A broker that finds the tests' models by name."""
    folders = ["--embeddings", str(models / "embeddings"), "--loras", str(models / "loras")]
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae"):
        folders += ["--models", str(models / name)]
    return BrokerProcess(binary, socket, ["--device", "cpu", *folders, *options]).start()


def status(process: BrokerProcess) -> dict[str, Any]:
    with luna_broker.connect(process.address) as client:
        return client.status()


def completed(process: BrokerProcess) -> dict[str, int]:
    """Requests that the broker's lanes have run, by service."""
    return {lane["service"]: int(lane["completed"]) for lane in status(process)["lanes"]}


def verified(process: BrokerProcess) -> list[dict[str, Any]]:
    """Of the attached weights of every file, the digest they were loaded with and that of what they contain now."""
    with luna_broker.connect(process.address) as client:
        files = {weights["path"] for weights in client.status()["weights"] if weights["path"]}
        return [found for file in sorted(files) for found in client.verify(file)]


def weights_mib(process: BrokerProcess, name: str) -> float:
    """What the parts of a checkpoint take once loaded, each in the element type that ComfyUI gives it on a CPU."""
    with luna_broker.connect(process.address) as client:
        return sum(model["bytes"] for model in client.models() if model["name"] == name) / MIB


def holds_weights(process: BrokerProcess, pid: int) -> bool:
    """Whether a process has attached weights."""
    now = status(process)
    sessions = {session["name"] for session in now["sessions"] if session["pid"] == pid}
    holders = {holder["name"] for weights in now["weights"] for holder in weights["holders"]}
    return bool(sessions & holders)
