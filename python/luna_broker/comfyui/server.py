"""What the sidebar asks ComfyUI's web server: `GET /luna_broker/status?broker=ADDRESS`.

The broker is asked on a thread, so that one that hangs holds up nothing but its own answer.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from luna_broker import LunaBrokerError
from luna_broker.comfyui import brokers
from luna_broker.comfyui.overview import overview

if TYPE_CHECKING:
    from aiohttp.web import Request, Response, RouteTableDef

PATH = "/luna_broker/status"

# What sessions are called that only ask, of this ComfyUI and of others: they are nobody's work.
ASKS = "-asks"

HANGS = "look at the broker's log, and whether the machine is overloaded"

# Sidebars that ask for the same broker share an answer: see `Questions`.
_THREADS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="luna-broker-status")


def add_routes(routes: RouteTableDef) -> None:
    """Adds the question to the routes of ComfyUI's web server."""
    from aiohttp import web

    asked = Questions()

    @routes.get(PATH)
    async def status(request: Request) -> Response:
        return web.json_response(await asked.ask(request.query.get("broker", "").strip()))


def _unknown(address: str) -> dict[str, Any]:
    message = f"no node of this ComfyUI has been given a broker at {address}"
    remedy = "run a workflow with a loader that names it, or set $LUNA_BROKER"
    return {"brokers": [], "error": {"kind": "Refused", "message": message, "remedy": remedy}}


def look(address: str) -> dict[str, Any]:
    """What the brokers at an address do, under `brokers`; or `error`, with its `kind`, `message` and `remedy`."""
    try:
        return {"brokers": overviews(address)}
    except LunaBrokerError as error:
        remedy = error.remedy or HANGS
        return {"brokers": [], "error": {"kind": error.kind, "message": _without(remedy, error), "remedy": remedy}}


def overviews(address: str) -> list[dict[str, Any]]:
    """What the brokers at an address do: one, or one for each service. Raises as `brokers.quick`."""
    # Not the worker's own client: with it Cancel would be taken for the sidebar's, and withheld from the workflow.
    client = brokers.quick(address)
    clients = [client.of(service) for service in brokers.split(address)] or [client]
    found: dict[str, dict[str, Any]] = {}
    for each in clients:
        status = each.status()
        status["sessions"] = [session for session in status["sessions"] if not session["name"].endswith(ASKS)]
        found.setdefault(status["address"], overview(status, f"comfyui-{os.getpid()}"))
    return list(found.values())


def _without(remedy: str, error: LunaBrokerError) -> str:
    return str(error).removesuffix(remedy).rstrip(" —")


class Questions:
    """Questions that are being answered. Whoever asks the same meanwhile gets the same answer, and no other thread."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, address: str) -> dict[str, Any]:
        # ComfyUI's server knows no users: whoever reaches it must not have this process connect to anything else.
        if not brokers.is_known(address):
            return _unknown(address)
        answer = self._answers.get(address)
        if answer is None:
            answer = asyncio.get_running_loop().run_in_executor(_THREADS, look, address)
            self._answers[address] = answer
            answer.add_done_callback(lambda _: self._answers.pop(address))
        # Who goes away must not take the answer with them.
        return await asyncio.shield(answer)
