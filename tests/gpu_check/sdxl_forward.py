"""One step of SDXL at 1024 x 1024 pixels through the broker, turn by turn with the same UNet in eager PyTorch.

First it is shown that all of them compute the same. Prints a line for each part as soon as it knows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import luna_broker
import torch
from programs import Broker, tell
from sdxl_scene import TOLERANCE, Given, Scene, arguments, distance, in_turn, rows_of
from sdxl_unet import FULL

EAGER = "eager PyTorch"
LAST = "eager PyTorch, channels last"
REMOTE = "through the broker"
IN_RUN = "through the broker, context and y sent once"
FROM_HOST = "through the broker, tensors of the host"

Ways = dict[str, Callable[[], torch.Tensor]]


def ways(scene: Scene, unet: luna_broker.Unet, given: Given) -> Ways:
    own = scene.own_unet()
    other = scene.own_unet().to(memory_format=torch.channels_last)
    run = unet.run()
    run(*given, conds=[0, 1])
    x, timesteps, *_ = given
    on_host = tuple(tensor.cpu() for tensor in given)
    return {
        EAGER: lambda: own(*given),
        LAST: lambda: other(*given),
        REMOTE: lambda: unet(*given),
        IN_RUN: lambda: run(x, timesteps, conds=[0, 1]),
        FROM_HOST: lambda: unet(*on_host),
    }


def exact(scene: Scene, given: Given) -> torch.Tensor:
    """The reference: float32, and no shorter mantissa anywhere."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    out = scene.own_unet(torch.float32)(*(tensor.float() for tensor in given))
    return out.cpu()


def numerics(scene: Scene, ways: Ways, given: Given) -> bool:
    wanted = exact(scene, given)
    empty_cache(scene)
    good = True
    for name, way in ways.items():
        found = distance(way(), wanted)
        # Once more: what is kept from call to call must not change anything.
        again = distance(way(), wanted)
        is_right = scene.is_right(max(found, again))
        tell(
            table="distance to float32 (relative L2)",
            way=name,
            distance=found,
            second_call=again,
            at_most=TOLERANCE[scene.place],
            is_right=is_right,
        )
        good &= is_right
    return good


def own_memory(scene: Scene, ways: Ways) -> None:
    """What the eager forward takes beside its weights."""
    if scene.place == "cpu":
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ways[EAGER]()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    tell(part=f"{EAGER}: memory of a forward", GB=round(taken / 1e9, 3))


def empty_cache(scene: Scene) -> None:
    if scene.place == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    scene = Scene(arguments(__doc__).parse_args())
    tell(part="weights", **scene.write_unet())
    # Batches are not the subject here, and the broker would time them.
    options = ["--device", scene.place, "--max-batch", "1"]
    with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder), *options) as broker:
        client = luna_broker.connect(broker.socket, timeout=120)
        unet = client.unet(str(scene.unet))
        is_right = unet.info["family"] == ("sdxl" if scene.sizes == FULL else "generic")
        facts = {key: unet.info[key] for key in ("family", "bytes", "device")} | unet.info["unet"]
        tell(part="found by the broker", **facts, is_right=is_right)
        given = scene.given()
        all_ways = ways(scene, unet, given)
        tell(part="rungs", rungs=[[rung.device, rung.rung, rung.order, rung.reason] for rung in client.session.rungs])
        # No time is told of what computes something else.
        if not (numerics(scene, all_ways, given) and is_right):
            return 1
        own_memory(scene, all_ways)
        for row in rows_of(in_turn(all_ways, scene.place, scene.rounds), EAGER):
            tell(table="a forward of two rows", **row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
