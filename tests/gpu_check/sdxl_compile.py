"""What torch.compile makes of SDXL's forward, turn by turn with the same in eager PyTorch.

The blocks of attention are compiled first, which takes a fraction of the time that the whole takes: there is a figure
before the time is over. What cannot be compiled on this machine is told and is no failure.
"""

from __future__ import annotations

import sys
import time

import torch
from hand_offs import said, synchronize
from programs import tell
from sdxl_forward import EAGER
from sdxl_scene import TOLERANCE, Given, Scene, arguments, distance, in_turn, rows_of, weights_in
from sdxl_unet import SdxlUnet, TransformerBlock, filled

BLOCKS = "blocks of attention compiled"
WHOLE = "compiled whole"


def compiled(scene: Scene, own: SdxlUnet, name: str, backend: str) -> SdxlUnet:
    """Another module on the same tensors: `own` stays as it was."""
    other = filled(scene.sizes, weights_in(own))
    # The sizes stay, and code for any size is slower.
    options = {"backend": backend, "dynamic": False}
    if name == WHOLE:
        other.compile(**options)
        return other
    for module in other.modules():
        if isinstance(module, TransformerBlock):
            module.compile(**options)
    return other


def measure(scene: Scene, own: SdxlUnet, given: Given, wanted: torch.Tensor, name: str, backend: str) -> bool:
    began = time.perf_counter()
    other = compiled(scene, own, name, backend)
    out = other(*given)
    synchronize(scene.place)
    seconds, found = round(time.perf_counter() - began, 1), distance(out, wanted)
    # Both may be off float32 by as much, to either side.
    is_right = found <= 2 * TOLERANCE[scene.place]
    tell(part=name, backend=backend, seconds_to_compile=seconds, distance_to_eager=found, is_right=is_right)
    if is_right:
        ways = {EAGER: lambda: own(*given), name: lambda: other(*given)}
        for row in rows_of(in_turn(ways, scene.place, scene.rounds), EAGER):
            tell(table="torch.compile", **row)
    return is_right


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--backend", default="inductor")
    chosen = parser.parse_args()
    scene = Scene(chosen)
    tell(part="weights", **scene.write_unet())
    own, given, good = scene.own_unet(), scene.given(), True
    wanted = own(*given)
    for name in (BLOCKS, WHOLE):
        try:
            good &= measure(scene, own, given, wanted, name, chosen.backend)
        except Exception as error:
            # No compiler on the machine, say.
            tell(part=name, left_out=said(error)[:1500])
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
