"""This process's connections to brokers: one for each address, shared by all nodes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import luna_broker
from luna_broker import Client, ConfigurationError, LunaBrokerError

SERVICES = ("unet", "clip", "vae")

# What a broker that was not there is called: a loader runs again once there is one.
ABSENT = "absent"

# A broker's start is reckoned from its uptime, to within what a question takes.
START_TOLERANCE_S = 2.0

# Of questions that a page waits for.
QUICK_TIMEOUT_S = 2.0

# Of what is asked before a prompt: a broker that does not answer within it is busy beyond what a user waits for.
DEADLINE_S = 10.0

_LOCK = threading.Lock()
# Addresses that nodes were given: nobody else has this process connect to others.
_NAMED: set[str] = set()
_CLIENTS: dict[tuple[int, str, float | None], Client] = {}
_STARTS: dict[tuple[str, int], float] = {}


def name(address: str) -> None:
    """A node was given this address: pages may ask what is there from now on."""
    _NAMED.add(address.strip())


def is_known(address: str) -> bool:
    """Whether the default broker is meant, or one that a node of this process was given."""
    return not address or address in _NAMED


def client(address: str = "") -> Client:
    """The client at an address, connected by the first who asks: "" for `$LUNA_BROKER`, else the default socket.

    It connects again by itself when its broker was restarted. While it waits, ComfyUI's Cancel takes the request back.
    Raises `ConnectionLost` where nobody listens, `ConfigurationError` for an address that cannot be read.
    """
    name(address)
    return _client(address)


def quick(address: str = "", timeout_s: float = QUICK_TIMEOUT_S) -> Client:
    """A client for questions that must be answered soon, whatever else this process waits for; Cancel is not for it.

    Raises as `client`, and `Timeout` where a broker hangs.
    """
    return _client(address, timeout_s)


def generation(address: str = "") -> str:
    """Who answers at an address: another text after a restart, `absent` where nobody does. Raises nothing."""
    name(address)
    try:
        asked = quick(address, DEADLINE_S)
        clients = [asked.of(service) for service in split(address)] or [asked]
        return " ".join(dict.fromkeys(_generation(each) for each in clients))
    except LunaBrokerError:
        return ABSENT


def split(address: str) -> dict[str, str]:
    """The address of each service where services have brokers of their own, else nothing: `vae=PATH,unet=PATH`.

    Raises `ConfigurationError` for a service that there is not.
    """
    address = address or os.environ.get("LUNA_BROKER", "")
    if not any(address.startswith(f"{service}=") for service in SERVICES):
        return {}
    found = {}
    for part in address.split(","):
        service, _, path = part.strip().partition("=")
        if service not in SERVICES or not path:
            raise ConfigurationError(f"{part!r} names no broker — write vae=PATH,unet=PATH,clip=PATH")
        found[service] = path
    return found


def _client(address: str, timeout_s: float | None = None) -> Client:
    key = (os.getpid(), address.strip(), timeout_s)
    with _LOCK:
        known = _CLIENTS.get(key)
    if known is not None:
        return known
    asks = timeout_s is not None
    name = f"comfyui-{os.getpid()}" + ("-asks" if asks else "")
    made = luna_broker.connect(key[1] or None, name=name, timeout=timeout_s, check=None if asks else _interrupt())
    with _LOCK:
        # Of two threads that were first, one drops its connection.
        return _CLIENTS.setdefault(key, made)


def _generation(asked: Client) -> str:
    status = asked.status()
    key = (str(status["address"]), int(status["pid"]))
    began = time.time() - float(status["uptime_s"])
    with _LOCK:
        known = _STARTS.setdefault(key, began)
        if abs(known - began) > START_TOLERANCE_S:
            known = _STARTS[key] = began
    return f"{key[0]}#{key[1]}@{known:.3f}"


def _interrupt() -> Callable[[], object] | None:
    """What raises once Cancel was pressed; `None` outside ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
    except ImportError:
        return None
    return throw_exception_if_processing_interrupted
