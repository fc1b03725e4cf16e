"""VAE calls that the broker runs, one at a time for all workers; this process has no VAE for it."""

from __future__ import annotations

from typing import Any, ClassVar

from luna_broker import Vae
from luna_broker.comfyui import brokers
from luna_broker.comfyui.inputs import number, part, source
from luna_broker.comfyui.nodes.loaders import BROKER, CATEGORY

Inputs = dict[str, dict[str, Any]]
Latent = dict[str, Any]

# What stock nodes do: a border that is wider than this share of a tile leaves nothing of it.
TILES_PER_OVERLAP = 4


class _Shared:
    """What the nodes have in common."""

    CATEGORY = CATEGORY
    HAS_TILES: ClassVar[bool] = False
    INPUT: ClassVar[tuple[str, tuple[Any, dict[str, Any]]]]

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        name, kind = cls.INPUT
        tiles = {
            "tile_size": number("INT", 512, 64, 4096, 64, "Side of a tile in pixels. Smaller ones take less memory."),
            "overlap": number("INT", 64, 0, 4096, 32, "Border in pixels that neighbouring tiles share and blend."),
        }
        return {
            "required": {
                name: kind,
                "vae_name": part(
                    "vae", "The VAE: a file of the broker's or of ComfyUI's, or a checkpoint that has one."
                ),
                **(tiles if cls.HAS_TILES else {}),
            },
            "optional": {"broker": BROKER},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str | None = None) -> bool:
        # Which files there are changes with brokers; one that is not there is an error that says more.
        return True


class _Decode(_Shared):
    INPUT = ("samples", ("LATENT", {"tooltip": "The latent to make a picture of."}))
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The picture.",)
    FUNCTION = "decode"


class _Encode(_Shared):
    INPUT = ("pixels", ("IMAGE", {"tooltip": "The picture to make a latent of."}))
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latent: the mean of what the VAE says, as stock nodes take it.",)
    FUNCTION = "encode"


class VAEDecode(_Decode):
    DESCRIPTION = "Makes a picture of a latent in the broker. Where memory does not do for the whole, in tiles."

    def decode(self, samples: Latent, vae_name: str, broker: str = "") -> tuple[Any]:
        return (_vae(vae_name, broker).decode(samples["samples"]),)


class VAEDecodeTiled(_Decode):
    DESCRIPTION = "Makes a picture of a latent in the broker, in tiles of a size that you choose."
    HAS_TILES = True

    def decode(self, samples: Latent, vae_name: str, tile_size: int, overlap: int, broker: str = "") -> tuple[Any]:
        vae = _vae(vae_name, broker)
        tile, border = (pixels // int(vae.info["ratio"]) for pixels in _tiles(tile_size, overlap))
        return (vae.decode_tiled(samples["samples"], tile_x=tile, tile_y=tile, overlap=border),)


class VAEEncode(_Encode):
    DESCRIPTION = "Makes a latent of a picture in the broker. Where memory does not do for the whole, in tiles."

    def encode(self, pixels: Any, vae_name: str, broker: str = "") -> tuple[Latent]:
        return ({"samples": _vae(vae_name, broker).encode(_colours(pixels))},)


class VAEEncodeTiled(_Encode):
    DESCRIPTION = "Makes a latent of a picture in the broker, in tiles of a size that you choose."
    HAS_TILES = True

    def encode(self, pixels: Any, vae_name: str, tile_size: int, overlap: int, broker: str = "") -> tuple[Latent]:
        tile, border = _tiles(tile_size, overlap)
        latent = _vae(vae_name, broker).encode_tiled(_colours(pixels), tile_x=tile, tile_y=tile, overlap=border)
        return ({"samples": latent},)


def _vae(name: str, broker: str) -> Vae:
    return source("vae", name).ask(brokers.client(broker).vae)


def _tiles(tile_size: int, overlap: int) -> tuple[int, int]:
    return tile_size, min(overlap, tile_size // TILES_PER_OVERLAP)


def _colours(pixels: Any) -> Any:
    """A picture without its alpha channel."""
    return pixels[..., :3]


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LunaBrokerVAEDecode": VAEDecode,
    "LunaBrokerVAEDecodeTiled": VAEDecodeTiled,
    "LunaBrokerVAEEncode": VAEEncode,
    "LunaBrokerVAEEncodeTiled": VAEEncodeTiled,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LunaBrokerVAEDecode": "Shared VAE Decode (Luna Broker)",
    "LunaBrokerVAEDecodeTiled": "Shared VAE Decode, Tiled (Luna Broker)",
    "LunaBrokerVAEEncode": "Shared VAE Encode (Luna Broker)",
    "LunaBrokerVAEEncodeTiled": "Shared VAE Encode, Tiled (Luna Broker)",
}
