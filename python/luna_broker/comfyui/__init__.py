"""Nodes for ComfyUI: workers on one machine share the models of a broker. Swap the loader, keep the workflow.

ComfyUI loads this folder by its path, so that it has another name there than in the package: everything is imported by
its full name, and exists once. Outside ComfyUI there are no nodes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

_PACK = Path(__file__).resolve().parent

WEB_DIRECTORY = str(_PACK / "web")


def _collect() -> None:
    """Imports the nodes once ComfyUI asks for them: the rest of the package is of use without."""
    classes: dict[str, Any] = {}
    titles: dict[str, str] = {}
    globals().update(NODE_CLASS_MAPPINGS=classes, NODE_DISPLAY_NAME_MAPPINGS=titles)
    if any(importlib.util.find_spec(name) is None for name in ("folder_paths", "comfy_execution")):
        return
    for file in sorted((_PACK / "nodes").glob("[a-z]*.py")):
        module = importlib.import_module(f"luna_broker.comfyui.nodes.{file.stem}")
        # What nodes share has none of its own.
        classes.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        titles.update(getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", {}))
    _serve_the_sidebar()
    _warn_of_versions()


def _serve_the_sidebar() -> None:
    from luna_broker.comfyui.server import add_routes
    from server import PromptServer

    # A ComfyUI that is used as a library has no web server.
    instance = getattr(PromptServer, "instance", None)
    if instance is not None:
        add_routes(instance.routes)


def _warn_of_versions() -> None:
    from luna_broker.comfyui import compat

    if not compat.is_known():
        logging.getLogger("luna_broker").warning(
            "luna-broker: ComfyUI %s is untested; this pack is made for %s", compat.version(), compat.SUPPORTED
        )


def __getattr__(name: str) -> Any:
    if name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        _collect()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
