"""What adapters and the first-block cache do to a step of SDXL at 1024 x 1024 pixels through the broker.

First it is shown that a step with an adapter is what the UNet with merged weights gives. Prints a line for each part as
soon as it knows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import luna_broker
import torch
import weight_file
from programs import Broker, tell
from sdxl_checkpoint import adapter_layer
from sdxl_scene import TOLERANCE, Given, Scene, arguments, distance, in_turn, ratio, rows_of, weights_in
from sdxl_unet import SdxlUnet

STRENGTH = 0.8
NONE = "no adapter"
SIDE, AGAIN, OTHER = "rank 16", "rank 16, as in the step before", "rank 16, another than in the step before"
MERGED = "rank 16, merged"

Stack = list[tuple[str, float]]


def merge(unet: SdxlUnet, path: str, strength: float, place: str) -> None:
    adapter = weight_file.read(path, place)
    for key, weight in weights_in(unet).items():
        layer = adapter_layer(key)
        if f"{layer}.lora_up.weight" in adapter:
            up, down = (adapter[f"{layer}.lora_{part}.weight"].float() for part in ("up", "down"))
            weight.add_((up @ down).to(weight.dtype), alpha=strength)


def stacks(scene: Scene, unet: luna_broker.Unet) -> dict[str, tuple[Stack, str]]:
    """By name, adapters and how they are applied; put together by now."""
    one, other, wide = (str(scene.write_adapter(rank, seed)) for rank, seed in ((16, 11), (16, 12), (64, 13)))
    found: dict[str, tuple[Stack, str]] = {
        NONE: ([], "side"),
        SIDE: ([(one, STRENGTH)], "side"),
        AGAIN: ([(one, STRENGTH)], "side"),
        OTHER: ([(other, STRENGTH)], "side"),
        "two of rank 16": ([(one, STRENGTH), (other, STRENGTH)], "side"),
        "rank 64": ([(wide, STRENGTH)], "side"),
        MERGED: ([(one, STRENGTH)], "merged"),
    }
    for name, (stack, mode) in found.items():
        if stack and name != AGAIN:
            began = time.perf_counter()
            taken = unet.prefetch(stack, lora_mode=mode)
            seconds = round(time.perf_counter() - began, 3)
            layers, unknown = (sum(adapter[part] for adapter in taken) for part in ("layers", "unknown_keys"))
            tell(table="adapters put together", stack=name, layers=layers, unknown_keys=unknown, seconds=seconds)
    return found


def numerics(scene: Scene, unet: luna_broker.Unet, found: dict[str, tuple[Stack, str]], given: Given) -> bool:
    """Each stack against weights that it was merged into, in float32 and with no shorter mantissa anywhere."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact, exactly = scene.own_unet(torch.float32), [tensor.float() for tensor in given]
    plain, most, good = exact(*exactly), TOLERANCE[scene.place], True
    for name, (stack, mode) in found.items():
        for path, strength in stack:
            merge(exact, path, strength, scene.place)
        wanted = exact(*exactly)
        for path, strength in stack:
            # What float32 rounds away by that is far below what is looked for.
            merge(exact, path, -strength, scene.place)
        off, effect = distance(unet(*given, loras=stack, lora_mode=mode), wanted), distance(plain, wanted)
        # Leaving it out must be told from taking it up.
        is_right = scene.is_right(off) and (not stack or effect > 4 * most)
        table = "distance to float32 with merged weights"
        tell(table=table, way=name, distance=off, without_adapters=effect, at_most=most, is_right=is_right)
        good &= is_right
    return good


def cache(scene: Scene, unet: luna_broker.Unet, given: Given) -> bool:
    """What a step costs that the cache leaves out."""
    # Equal steps differ by nothing: that is not less than nothing, and less than anything else.
    runs = {"computed": unet.run(fb_cache=0.0), "left out": unet.run(fb_cache=1e9)}
    verdicts: dict[str, set[str]] = {name: set() for name in runs}
    wanted = unet(*given)

    def step(name: str) -> torch.Tensor:
        out = runs[name](*given, conds=[0, 1])
        verdicts[name].add(runs[name].last.step["cache"]["verdict"])
        return out

    times = in_turn({name: lambda name=name: step(name) for name in runs}, scene.place, scene.rounds)
    for row in rows_of(times, "computed"):
        tell(table="first-block cache", **row)
    # Of a step like the one before, what is added again is right.
    worst = max(distance(step(name), wanted) for name in runs)
    said = {name: sorted(of - {"empty"}) for name, of in verdicts.items()}
    is_right = said == {"computed": ["different"], "left out": ["hit"]} and scene.is_right(worst / 2)
    tell(part="first-block cache", verdicts=said, distance_to_none=worst, is_right=is_right)
    return is_right


def main() -> int:
    scene = Scene(arguments(__doc__).parse_args())
    tell(part="weights", **scene.write_unet())
    options = ["--device", scene.place, "--max-batch", "1"]
    with tempfile.TemporaryDirectory() as folder, Broker(scene.broker, Path(folder), *options) as broker:
        client = luna_broker.connect(broker.socket, timeout=120)
        unet, given = client.unet(scene.unet), scene.given()
        client.load(str(scene.unet))
        found = stacks(scene, unet)
        if not numerics(scene, unet, found, given):
            return 1

        def step(stack: Stack, mode: str):
            return lambda: unet(*given, loras=stack, lora_mode=mode)

        ways = {name: step(stack, mode) for name, (stack, mode) in found.items()}
        # In this order each time: what came in the step before matters.
        times = in_turn(ways, scene.place, scene.rounds, begin_anywhere=False)
        for row in rows_of(times, NONE):
            tell(table="adapters of all linear layers of attention", **row)
        tell(part="another adapter than in the step before", of_the_same_again=ratio(times, OTHER, AGAIN))
        return int(not cache(scene, unet, given))


if __name__ == "__main__":
    sys.exit(main())
