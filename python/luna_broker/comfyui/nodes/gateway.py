"""Everything that a prompt and a LoRA stack ask for, applied to a MODEL and a CLIP, wherever each of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from luna_broker.comfyui import notices
from luna_broker.comfyui.inputs import number, text
from luna_broker.comfyui.nodes.loaders import CATEGORY
from luna_broker.comfyui.prompt import Lora, Prompt, parse
from luna_broker.comfyui.stack import Stack, gather

LoraStack = Sequence[Sequence[Any]]

PACKAGE = "luna_broker.comfyui"

NO_CACHE = "the block cache was left out: the broker has it, for a remote MODEL; EasyCache is for others"


class ConfigGateway:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies the LoRAs that prompts name, <lora:name:0.8:0.6>, and those of a LoRA stack; encodes both prompts"
        " without them; and sets the broker's block cache. MODEL and CLIP may each be remote, attached or local."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "CONDITIONING", "CONDITIONING", "LORA_STACK", "STRING", "STRING", "STRING")
    RETURN_NAMES = ("model", "clip", "positive", "negative", "lora_stack", "positive_text", "negative_text", "metadata")
    OUTPUT_TOOLTIPS = (
        "The MODEL with the LoRAs and the block cache.",
        "The CLIP with the LoRAs.",
        "The encoded positive prompt.",
        "The encoded negative prompt.",
        "The LoRAs that were applied, in their order.",
        "The positive prompt without its LoRAs.",
        "The negative prompt without its LoRAs.",
        "What was applied, as JSON: LoRAs, strengths, block cache, where MODEL and CLIP run, and what was skipped.",
    )
    FUNCTION = "apply"

    def __init__(self) -> None:
        # Stock loaders, each of which keeps its file: a prompt that keeps its LoRAs reads none again.
        self._loaders: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        share = "Share of the sampling steps, 0 to 1,"
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From any loader: remote, attached or local."}),
                "clip": ("CLIP", {"tooltip": "From any loader: remote, attached or local."}),
                "positive": text(
                    "What the picture is to show. <lora:name:0.8:0.6> applies a LoRA at 0.8, its text at 0.6."
                ),
                "negative": text("What the picture is led away from. LoRAs named here are applied as well."),
                "cache_threshold": number(
                    "FLOAT",
                    0.0,
                    0.0,
                    1.0,
                    0.01,
                    "How alike steps must be for the rest of one to be left out; 0 for never.",
                ),
                "cache_start": number("FLOAT", 0.0, 0.0, 1.0, 0.01, f"{share} before which none is left out."),
                "cache_end": number("FLOAT", 1.0, 0.0, 1.0, 0.01, f"{share} behind which none is left out."),
                "cache_max_hits": number(
                    "INT", -1, -1, 100, 1, "How many steps in a row may be left out; -1 for any number, 0 for none."
                ),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs that are applied before those of the prompts."}),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def apply(
        self,
        model: Any,
        clip: Any,
        positive: str,
        negative: str,
        cache_threshold: float,
        cache_start: float,
        cache_end: float,
        cache_max_hits: int,
        node: str,
        lora_stack: LoraStack | None = None,
    ) -> dict[str, Any]:
        import folder_paths
        import nodes as stock

        prompts = parse(positive), parse(negative)
        stack = gather(lora_stack or (), prompts, folder_paths.get_filename_list("loras"))
        warnings = list(stack.warnings)
        model, clip = self._with_loras(model, clip, stack.loras)
        cache = _cache(cache_threshold, cache_start, cache_end, cache_max_hits)
        if cache is not None and where(model) == "remote":
            # Not above: it relies on a ComfyUI that may be another than it is made for.
            from luna_broker.comfyui import remote

            model = remote.with_block_cache(model, **cache)
        elif cache is not None:
            warnings.append(NO_CACHE)
            cache = None
        encoded = (stock.CLIPTextEncode().encode(clip, prompt.text)[0] for prompt in prompts)
        metadata = _metadata(stack, prompts, cache, where(model), where(clip.patcher), warnings)
        notices.tell(node, _lines(stack, warnings), warning=bool(warnings))
        texts = (prompt.text for prompt in prompts)
        result = (model, clip, *encoded, [tuple(lora) for lora in stack.loras], *texts, metadata)
        return {"ui": {"text": warnings}, "result": result}

    def _with_loras(self, model: Any, clip: Any, loras: Sequence[Lora]) -> tuple[Any, Any]:
        import nodes as stock

        self._loaders = {lora.name: self._loaders.get(lora.name) or stock.LoraLoader() for lora in loras}
        for lora in loras:
            model, clip = self._loaders[lora.name].load_lora(model, clip, *lora)
        return model, clip


def where(patcher: Any) -> str:
    """Where a model runs: "remote", "attached" or "local"."""
    module = type(patcher).__module__
    return next((mode for mode in ("remote", "attached") if module.startswith(f"{PACKAGE}.{mode}.")), "local")


def _cache(threshold: float, start: float, end: float, max_hits: int) -> dict[str, Any] | None:
    if threshold <= 0 or max_hits == 0 or start >= end:
        return None
    return {"threshold": threshold, "start": start, "end": end, "max_hits": None if max_hits < 0 else max_hits}


def _metadata(
    stack: Stack,
    prompts: Sequence[Prompt],
    cache: dict[str, Any] | None,
    model: str,
    clip: str,
    warnings: Sequence[str],
) -> str:
    told = {
        "loras": [lora._asdict() for lora in stack.loras],
        "positive": prompts[0].text,
        "negative": prompts[1].text,
        "model": model,
        "clip": clip,
        "block_cache": cache,
        "warnings": warnings,
    }
    return json.dumps(told, indent=2, ensure_ascii=False)


def _lines(stack: Stack, warnings: Sequence[str]) -> str:
    """What the node says: what it applied, and what it did not."""
    applied = ", ".join(f"{lora.name} at {lora.model_strength:g}:{lora.clip_strength:g}" for lora in stack.loras)
    return "\n".join([f"LoRAs: {applied or 'none'}", *warnings])


NODE_CLASS_MAPPINGS: dict[str, type] = {"LunaBrokerConfigGateway": ConfigGateway}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"LunaBrokerConfigGateway": "Config Gateway (Luna Broker)"}
