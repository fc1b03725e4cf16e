"""What the broker does, as text in the workflow."""

from __future__ import annotations

import math
from typing import Any

from luna_broker.comfyui import brokers, notices, server
from luna_broker.comfyui.nodes.loaders import BROKER, CATEGORY
from luna_broker.comfyui.overview import as_text, summary


class BrokerStatus:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Says what the broker holds and saves, what waits in its lanes, and how tensors cross between it and each"
        " worker, and why that way. Asks anew each time."
    )
    RETURN_TYPES = ("STRING", "INT")
    RETURN_NAMES = ("status", "saved_bytes")
    OUTPUT_TOOLTIPS = ("What it says, as text.", "Bytes that workers would take in addition with models of their own.")
    FUNCTION = "ask"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {},
            "optional": {
                "broker": BROKER,
                "after": ("*", {"tooltip": "Anything: the broker is asked once this is there."}),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return math.nan

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        # For ComfyUI versions that take "*" for a type of its own.
        return True

    def ask(self, node: str, broker: str = "", after: Any = None) -> dict[str, Any]:
        brokers.name(broker)
        told = server.overviews(broker.strip())
        text = as_text(told)
        notices.tell(node, summary(told))
        return {"ui": {"text": [text]}, "result": (text, sum(each["saved_bytes"] for each in told))}


NODE_CLASS_MAPPINGS: dict[str, type] = {"LunaBrokerStatus": BrokerStatus}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"LunaBrokerStatus": "Broker Status (Luna Broker)"}
