"""Loaders: ComfyUI's own, with a choice of where the model is to run."""

from __future__ import annotations

from typing import Any

from luna_broker.comfyui import files, loading

CATEGORY = "Luna Broker"

CLIP_TYPES = ("stable_diffusion", "sdxl", "stable_cascade", "sd3", "flux", "hunyuan_video", "hidream", "pixart", "wan")

NONE = "none"

MODE = (
    ["auto", "attached", "remote", "local"],
    {
        "default": "auto",
        "tooltip": "attached: this ComfyUI computes, with weights that all workers share. remote: the broker "
        "computes. local: as ComfyUI's own loader. auto: attached where that copies nothing, else remote, and local "
        "without a broker.",
    },
)
ON_FAILURE = (
    ["local", "error"],
    {
        "default": "local",
        "tooltip": "What becomes of the workflow where the broker cannot give the model: it loads its own, or it ends "
        "with an error.",
    },
)
BROKER = (
    "STRING",
    {
        "default": "",
        "tooltip": "Socket of the broker. Empty: $LUNA_BROKER, else the default. Where services have brokers of their "
        "own: unet=PATH,clip=PATH,vae=PATH",
    },
)
PRECISION = (
    ["auto", "fp32", "fp16", "bf16", "fp8_e4m3fn"],
    {
        "default": "auto",
        "tooltip": "Element type of the diffusion model's weights. auto: what ComfyUI chooses for this machine.",
    },
)


def choices(**more: Any) -> dict[str, Any]:
    """The inputs that all loaders have."""
    return {"mode": MODE, "on_failure": ON_FAILURE, "broker": BROKER, **more}


class Loader:
    """What all loaders do."""

    CATEGORY = CATEGORY
    FUNCTION = "load"

    KIND = ""
    NAMES: tuple[str, ...] = ()

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str | float:
        names, wanted = cls._wanted(inputs)
        return loading.changed(cls.KIND, names, **wanted)

    @classmethod
    def _wanted(cls, inputs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Names of files, and the other inputs as `loading` names them."""
        # What comes from another node is not there yet when ComfyUI asks whether anything changed.
        inputs = {name: value for name, value in inputs.items() if value is not None}
        names = [inputs[name] for name in cls.NAMES if inputs.get(name) not in (None, "", NONE)]
        asked = ("mode", "on_failure", "precision", "type")
        return names, {"address": inputs.get("broker", ""), **{key: inputs[key] for key in asked if key in inputs}}

    def _load(self, inputs: dict[str, Any]) -> loading.Loaded:
        node = inputs.pop("node", None)
        names, wanted = self._wanted(inputs)
        return loading.load(self.KIND, names, node=node, **wanted)


def told(loaded: loading.Loaded, *results: Any) -> dict[str, Any]:
    """A node's results, and the line about them: where the results were kept, the line stays too."""
    return {"ui": {"text": [loaded.line]}, "result": results}


def _any_name(name: str | None) -> bool | str:
    """The lists are of the default broker, and a node may ask another: whether there is such a file turns out later."""
    return True if name is None or name.strip() else "choose a file"


class CheckpointLoader(Loader):
    """A checkpoint: diffusion model, text encoders and VAE."""

    KIND = "checkpoint"
    NAMES = ("ckpt_name",)
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("The diffusion model.", "The text encoders.", "The VAE.")
    DESCRIPTION = "Loads a checkpoint that all workers of this machine share. Every other node stays as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A file of ComfyUI's folder of checkpoints, or of the broker's."
        return {
            "required": {"ckpt_name": (files.choices(cls.KIND), {"tooltip": tooltip})},
            "optional": choices(precision=PRECISION),
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, ckpt_name: str | None = None) -> bool | str:
        return _any_name(ckpt_name)

    def load(self, **inputs: Any) -> dict[str, Any]:
        loaded = self._load(inputs)
        return told(loaded, loaded.model, loaded.clip, loaded.vae)


class UNETLoader(Loader):
    """A diffusion model of its own."""

    KIND = "unet"
    NAMES = ("unet_name",)
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The diffusion model.",)
    DESCRIPTION = "Loads a diffusion model that all workers of this machine share."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A file of ComfyUI's folder of diffusion models, or of the broker's."
        return {
            "required": {"unet_name": (files.choices(cls.KIND), {"tooltip": tooltip})},
            "optional": choices(precision=PRECISION),
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str | None = None) -> bool | str:
        return _any_name(unet_name)

    def load(self, **inputs: Any) -> dict[str, Any]:
        loaded = self._load(inputs)
        return told(loaded, loaded.model)


class CLIPLoader(Loader):
    """Text encoders: one file, or two that belong together."""

    KIND = "clip"
    NAMES = ("clip_name", "clip_name2")
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoders.",)
    DESCRIPTION = "Loads text encoders that all workers of this machine share. For SDXL: CLIP-L and CLIP-G."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = files.choices(cls.KIND)
        tooltip = "A file of ComfyUI's folder of text encoders, or of the broker's."
        second = "The other one of two text encoders that belong together, in any order."
        return {
            "required": {"clip_name": (names, {"tooltip": tooltip})},
            "optional": {
                "clip_name2": ([NONE, *names], {"default": NONE, "tooltip": second}),
                "type": (list(CLIP_TYPES), {"default": CLIP_TYPES[0], "tooltip": "What they are the encoders of."}),
                **choices(),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name: str | None = None, clip_name2: str | None = None) -> bool | str:
        return _any_name(clip_name)

    def load(self, **inputs: Any) -> dict[str, Any]:
        loaded = self._load(inputs)
        return told(loaded, loaded.clip)


class VAELoader(Loader):
    """A VAE."""

    KIND = "vae"
    NAMES = ("vae_name",)
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The VAE.",)
    DESCRIPTION = "Loads a VAE that all workers of this machine share."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A file of ComfyUI's folder of VAEs, or of the broker's."
        return {
            "required": {"vae_name": (files.choices(cls.KIND), {"tooltip": tooltip})},
            "optional": choices(),
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str | None = None) -> bool | str:
        return _any_name(vae_name)

    def load(self, **inputs: Any) -> dict[str, Any]:
        loaded = self._load(inputs)
        return told(loaded, loaded.vae)


NODE_CLASS_MAPPINGS = {
    "LunaBrokerCheckpointLoader": CheckpointLoader,
    "LunaBrokerUNETLoader": UNETLoader,
    "LunaBrokerCLIPLoader": CLIPLoader,
    "LunaBrokerVAELoader": VAELoader,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LunaBrokerCheckpointLoader": "Load Checkpoint (Luna Broker)",
    "LunaBrokerUNETLoader": "Load Diffusion Model (Luna Broker)",
    "LunaBrokerCLIPLoader": "Load CLIP (Luna Broker)",
    "LunaBrokerVAELoader": "Load VAE (Luna Broker)",
}
