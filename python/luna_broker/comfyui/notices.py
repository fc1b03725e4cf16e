"""What nodes tell the user: one line in the log, and on the node."""

from __future__ import annotations

import logging

_LOG = logging.getLogger("luna_broker")


def tell(node: str | None, text: str, warning: bool = False) -> None:
    """Says `text` in ComfyUI's log, and on the node of that id where somebody looks at it. Raises nothing.

    `node`: the hidden input UNIQUE_ID; `None` for the node that runs now, if any does.
    """
    where = node if node is not None else _running()
    _LOG.log(logging.WARNING if warning else logging.INFO, "luna-broker, node %s: %s", where, text)
    if where is None:
        return
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, where)
    except (ImportError, AttributeError):
        # No web server: a ComfyUI that is used as a library, or a test.
        return


def _running() -> str | None:
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return None if context is None else str(context.node_id)
