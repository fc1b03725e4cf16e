"""What each part of SDXL takes of the GPU in a broker: its weights, and the most while it works at 1024 x 1024 pixels.

On the CPU it is the memory that the broker's process is charged for. Text encoders and VAE are compared with the same
on the CPU; the UNet is elsewhere. Prints a line for each part as soon as it knows.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import luna_broker
import torch
from device_memory import Peak, taken
from hand_offs import synchronize
from programs import Broker, tell
from sdxl_scene import Scene, arguments, distance

PROMPT = "a photograph of an astronaut riding a horse, (highly detailed:1.2)"
# Relative L2 distance to the same on the CPU: text encoders compute in float32 in either place, VAEs on a GPU in
# bfloat16.
TEXT_TOLERANCE, VAE_TOLERANCE = 1e-3, 3e-2


class Account:
    """Rows of the table: one for each thing that is done."""

    def __init__(self, scene: Scene, broker: Broker, client: luna_broker.Client, before: int) -> None:
        self.scene, self.client, self.before = scene, client, before
        self.processes = [broker.process.pid]
        self.good = True

    def row(self, part: str, work: Callable[[], object]) -> None:
        had = taken(self.scene.place, self.processes)
        with Peak(self.scene.place, self.processes) as peak:
            # Results are the broker's memory too: they are kept until the peak is known.
            result = work()
            synchronize(self.scene.place)
        is_right = all(tensor.isfinite().all().item() for tensor in tensors(result))
        self.good &= is_right
        del result
        has = taken(self.scene.place, self.processes)
        tell(
            table="memory by part",
            part=part,
            added_GB=gigabytes(has - had),
            all_GB=gigabytes(has - self.before),
            most_GB=gigabytes(peak.bytes - self.before),
            weights_as_told_GB=gigabytes(sum(model["bytes"] for model in self.loaded())),
            tensors_as_told_GB=gigabytes(arenas(self.client.metrics())),
            is_finite=is_right,
        )

    def loaded(self) -> list[dict]:
        return [model for model in self.client.models() if model["loaded"]]


def tensors(result: object) -> list[torch.Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def arenas(metrics: str) -> int:
    """Bytes of memory that tensors cross in: a GPU's where there is one."""
    found = dict(re.findall(r'^luna_broker_arena_bytes\{device="([^"]+)"\} (\d+)', metrics, re.MULTILINE))
    return int(next((number for device, number in found.items() if device != "cpu"), found.get("cpu", 0)))


def gigabytes(number: int) -> float:
    return round(number / 1e9, 3)


def play(scene: Scene, broker: Broker, client: luna_broker.Client, before: int) -> bool:
    account = Account(scene, broker, client, before)
    row, given, place = account.row, scene.given(), scene.place
    latent = given[0][:1].float()
    row("a session, nothing loaded", lambda: client.empty((1,), torch.float32, device=place).zero_())
    clip, unet, vae = client.clip(scene.text), client.unet(scene.unet), client.vae(str(scene.vae))
    row("text encoders: loaded", lambda: client.load(str(scene.text)))
    row("text encoders: a prompt", lambda: clip.encode(PROMPT, device=place))
    row("UNet: loaded", lambda: client.load(str(scene.unet)))
    row("UNet: a step of two rows", lambda: unet(*given))
    row("UNet: ten more", lambda: [unet(*given) for _ in range(10)][-1])
    row("VAE: loaded", lambda: client.load(str(scene.vae)))
    row("VAE: a picture decoded", lambda: vae.decode(latent))
    row("VAE: one more", lambda: vae.decode(latent))
    tell(part="VAE: a picture decoded", mode=vae.last.mode)
    row("VAE: a picture decoded, and encoded", lambda: vae.encode(vae.decode(latent)))
    for name, path in (("text encoders", scene.text), ("UNet", scene.unet), ("VAE", scene.vae)):
        row(f"{name}: unloaded", lambda path=path: client.unload(path))
    return account.good


def as_on_the_cpu(scene: Scene, client: luna_broker.Client) -> bool:
    # A quarter of the sides: a CPU takes long for it.
    latent = scene.given(1, scene.side // 4, place="cpu")[0].float()

    def work(client: luna_broker.Client) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cond, pooled = client.clip(scene.text).encode(PROMPT)
        return cond, pooled, client.vae(str(scene.vae)).decode(latent)

    with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder)) as broker:
        wanted = work(luna_broker.connect(broker.socket, timeout=120))
    good = True
    tolerances = {"conditioning": TEXT_TOLERANCE, "pooled row": TEXT_TOLERANCE, "picture decoded": VAE_TOLERANCE}
    for (part, most), one, other in zip(tolerances.items(), work(client), wanted, strict=True):
        is_right = distance(one, other) <= most
        tell(table="distance to the CPU", part=part, distance=distance(one, other), at_most=most, is_right=is_right)
        good &= is_right
    return good


def main() -> int:
    scene = Scene(arguments(__doc__).parse_args())
    for write in (scene.write_unet, scene.write_text, scene.write_vae):
        tell(part="weights", **write())
    if scene.place == "cuda":
        # This process's own context counts neither before nor after.
        scene.given()
        synchronize(scene.place)
    before = taken(scene.place)
    with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder), "--device", scene.place) as broker:
        client = luna_broker.connect(broker.socket, timeout=120)
        good = play(scene, broker, client, before)
        return int(not (as_on_the_cpu(scene, client) and good))


if __name__ == "__main__":
    sys.exit(main())
