"""Prompts that the broker tokenizes and encodes; this process has no text encoders for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luna_broker import Clip
from luna_broker.comfyui import brokers, notices
from luna_broker.comfyui.inputs import CLIP_SKIP, Input, number, part, source, text
from luna_broker.comfyui.nodes.loaders import BROKER, CATEGORY, NONE

Inputs = dict[str, dict[str, Any]]
Conditioning = list[list[Any]]

POSITIVE = "What the picture is to show. (word:1.2) weighs, embedding:name is a file of the broker's folders."
NEGATIVE = "What the picture is led away from."


class _Shared:
    """What the nodes have in common."""

    CATEGORY = CATEGORY

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name1: str | None = None, clip_name2: str | None = None) -> bool:
        # Which files there are changes with brokers; one that is not there is an error that says more.
        return True


class CLIPTextEncode(_Shared):
    DESCRIPTION = "Encodes a prompt in the broker."
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The encoded prompt.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return _inputs(text=text(POSITIVE))

    def encode(
        self, text: str, clip_name1: str, clip_name2: str, clip_skip: int, node: str, broker: str = ""
    ) -> tuple[Conditioning, ...]:
        return _conditionings(_clip(broker, clip_name1, clip_name2), node, [(text, "")], clip_skip)


class CLIPTextEncodeDual(_Shared):
    DESCRIPTION = "Encodes the positive and the negative prompt in the broker."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("The encoded positive prompt.", "The encoded negative prompt.")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return _inputs(positive=text(POSITIVE), negative=text(NEGATIVE))

    def encode(
        self,
        positive: str,
        negative: str,
        clip_name1: str,
        clip_name2: str,
        clip_skip: int,
        node: str,
        broker: str = "",
    ) -> tuple[Conditioning, ...]:
        clip = _clip(broker, clip_name1, clip_name2)
        return _conditionings(clip, node, [(positive, ""), (negative, "")], clip_skip)


class CLIPTextEncodeSDXL(_Shared):
    DESCRIPTION = "Encodes both prompts for SDXL in the broker, with the sizes that SDXL is told."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("The encoded positive prompt, with sizes.", "The encoded negative prompt, with sizes.")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        inputs = _inputs(
            positive=text(POSITIVE),
            negative=text(NEGATIVE),
            width=_pixels(1024, "Width of the picture that the training picture was made of."),
            height=_pixels(1024, "Height of the picture that the training picture was made of."),
            crop_w=_pixels(0, "What was cut off it on the left."),
            crop_h=_pixels(0, "What was cut off it at the top."),
            target_width=_pixels(1024, "Width of the picture asked for."),
            target_height=_pixels(1024, "Height of the picture asked for."),
        )
        inputs["optional"]["positive_g"] = text("Other words of the positive prompt for CLIP-G; empty for the same.")
        inputs["optional"]["negative_g"] = text("Other words of the negative prompt for CLIP-G; empty for the same.")
        return inputs

    def encode(
        self,
        positive: str,
        negative: str,
        clip_name1: str,
        clip_name2: str,
        clip_skip: int,
        node: str,
        broker: str = "",
        positive_g: str = "",
        negative_g: str = "",
        **sizes: int,
    ) -> tuple[Conditioning, ...]:
        clip = _clip(broker, clip_name1, clip_name2)
        prompts = ((positive, positive_g), (negative, negative_g))
        return _conditionings(clip, node, prompts, clip_skip, sizes)


def _inputs(**own: Input) -> Inputs:
    return {
        "required": {
            **own,
            "clip_name1": part("clip", "Text encoders: a file of the broker's or of ComfyUI's, or a checkpoint."),
            "clip_name2": part("clip", "The second file, where CLIP-L and CLIP-G are in files of their own.", True),
            "clip_skip": CLIP_SKIP,
        },
        "optional": {"broker": BROKER},
        "hidden": {"node": "UNIQUE_ID"},
    }


def _pixels(default: int, tooltip: str) -> Input:
    return number("INT", default, 0, 16384, 1, f"{tooltip} In pixels.")


def _clip(broker: str, *names: str) -> Clip:
    client = brokers.client(broker)
    # One after the other: of several files, the broker may know some by another path than this process.
    known = [source("clip", name).ask(lambda file: (client.header(file), file)[1]) for name in names if name != NONE]
    return client.clip(*known)


def _conditionings(
    clip: Clip, node: str, prompts: Sequence[tuple[str, str]], skip: int, sizes: Mapping[str, int] | None = None
) -> tuple[Conditioning, ...]:
    """Prompts, each with other words for CLIP-G or none, encoded. What they name in vain, the node says."""
    # Without its projection, as stock nodes take SD1's, whose UNet looks at neither.
    is_projected = clip.info["family"] != "clip-l"
    encoded, ignored = [], []
    for prompt, other in prompts:
        context, pooled = clip.encode(prompt, text_g=other or None, skip=skip or None, project=is_projected)
        ignored += [f"the embedding {name!r} was left out: {reason}" for name, reason in clip.last.ignored]
        encoded.append([[context, {"pooled_output": pooled, **(sizes or {})}]])
    if ignored:
        notices.tell(node, "\n".join(ignored), warning=True)
    return tuple(encoded)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LunaBrokerCLIPTextEncode": CLIPTextEncode,
    "LunaBrokerCLIPTextEncodeDual": CLIPTextEncodeDual,
    "LunaBrokerCLIPTextEncodeSDXL": CLIPTextEncodeSDXL,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LunaBrokerCLIPTextEncode": "Shared CLIP Encode (Luna Broker)",
    "LunaBrokerCLIPTextEncodeDual": "CLIP Encode, Dual (Luna Broker)",
    "LunaBrokerCLIPTextEncodeSDXL": "CLIP Encode, SDXL (Luna Broker)",
}
