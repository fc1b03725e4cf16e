"""Loads a model the way that was asked for, or the way that suits, and says which that was.

Whatever fails on the way to the broker ends in a model of this process's own, unless the user wants an error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import luna_broker
from luna_broker import Busy, Client, LunaBrokerError, ModelNotFound, Timeout, Unsupported
from luna_broker.comfyui import brokers, compat, files, notices
from luna_broker.comfyui.choice import Choice, Mode, OnFailure, Worker, choose
from luna_broker.comfyui.files import Source
from luna_broker.comfyui.loaded import Loaded
from luna_broker.errors import refusal

LOCALLY = "load it with mode local"


@dataclass(frozen=True)
class Wanted:
    """What a loader is asked for."""

    kind: str
    """ "checkpoint", "unet", "clip" or "vae"."""
    names: tuple[str, ...]
    mode: Mode = Mode.AUTO
    on_failure: OnFailure = OnFailure.LOCAL
    address: str = ""
    precision: str = "auto"
    """Of the diffusion model."""
    type: str = "stable_diffusion"
    """Of text encoders, as in ComfyUI's own loaders."""


# What had to be loaded locally for a reason that may have passed: a loader that is asked for it again runs again.
_PASSED_BY: set[Wanted] = set()


def load(
    kind: str,
    names: Sequence[str],
    mode: str = "auto",
    on_failure: str = "local",
    address: str = "",
    precision: str = "auto",
    type: str = "stable_diffusion",
    node: str | None = None,
) -> Loaded:
    """Loads the files of these names as one model, and tells the user, on the node, in which mode and why.

    `kind`: "checkpoint", "unet", "clip" or "vae". Raises `LunaBrokerError` where there is no such file anywhere, and
    with `on_failure` "error" where `mode` cannot be had; "auto" ends in a local model rather than in an error.
    """
    wanted = Wanted(kind, tuple(names), Mode(mode), OnFailure(on_failure), address.strip(), precision, type)
    sources = [files.resolve(kind, name) for name in names]
    _PASSED_BY.discard(wanted)
    loaded = _from_broker(wanted, sources)
    if isinstance(loaded, Choice):
        loaded = _local(wanted, sources, loaded)
    is_fallback = wanted.mode is not Mode.LOCAL and loaded.choice.mode is Mode.LOCAL
    notices.tell(node, f"{', '.join(names)} is {loaded.line}", warning=is_fallback)
    return loaded


def changed(
    kind: str,
    names: Sequence[str],
    mode: str = "auto",
    on_failure: str = "local",
    address: str = "",
    precision: str = "auto",
    type: str = "stable_diffusion",
) -> str | float:
    """What a loader's IS_CHANGED returns: it runs again after a restart of its broker, and where a broker was busy."""
    wanted = Wanted(kind, tuple(names), Mode(mode), OnFailure(on_failure), address.strip(), precision, type)
    if wanted.mode is Mode.LOCAL:
        return ""
    # Not equal to itself: what ComfyUI remembers of the loader does not count.
    return math.nan if wanted in _PASSED_BY else brokers.generation(wanted.address)


def _from_broker(wanted: Wanted, sources: Sequence[Source]) -> Loaded | Choice:
    """The model, or why it is to be local."""
    if wanted.mode is Mode.LOCAL:
        return Choice(Mode.LOCAL, "as asked for")
    mode = wanted.mode
    try:
        choice = choose(wanted.mode, lambda: _worker(wanted))
        if choice.mode is Mode.LOCAL:
            return choice
        mode = choice.mode
        client = brokers.client(wanted.address)
        loaded = _refusing_the_unknown(client, wanted, sources, choice)
    except LunaBrokerError as error:
        if wanted.mode is not Mode.AUTO and wanted.on_failure is OnFailure.ERROR:
            raise
        if _may_pass(error):
            _PASSED_BY.add(wanted)
        tried = "no broker answers for it" if mode is Mode.AUTO else f"{mode.value} could not be had"
        return Choice(Mode.LOCAL, f"{tried}: {error}")
    if wanted.on_failure is OnFailure.LOCAL:
        from luna_broker.comfyui import rescue

        name = ", ".join(wanted.names)
        return rescue.protect(loaded, rescue.Rescue(name, lambda: _local(wanted, sources, choice)))
    return loaded


def _refusing_the_unknown(client: Client, wanted: Wanted, sources: Sequence[Source], choice: Choice) -> Loaded:
    """The model. What fails since this ComfyUI is another than the pack is made for is refused, with the reason."""
    lacks = compat.missing(choice.mode.value)
    what = f"{', '.join(wanted.names)} cannot be {choice.mode.value} in this ComfyUI, {compat.version()}"
    if lacks:
        raise refusal(Unsupported, f"{what}: it is otherwise in {', '.join(lacks)}", LOCALLY)
    try:
        return _by_broker(client, wanted, sources, choice)
    except (AttributeError, ImportError, TypeError) as error:
        if compat.is_known():
            raise
        raise refusal(Unsupported, f"{what}: {error}", LOCALLY) from error


def _by_broker(client: Client, wanted: Wanted, sources: Sequence[Source], choice: Choice) -> Loaded:
    # Imported here, as both rely on the inside of a ComfyUI.
    if choice.mode is Mode.ATTACHED:
        from luna_broker.comfyui import attached as way
    else:
        from luna_broker.comfyui import remote as way
    if wanted.kind == "checkpoint":
        # The broker computes in what precision it was started with.
        precision = (wanted.precision,) if choice.mode is Mode.ATTACHED else ()
        return Loaded(choice, *way.checkpoint(client, sources[0], *precision))
    if wanted.kind == "unet":
        return Loaded(choice, model=way.diffusion_model(client, sources[0], wanted.precision))
    if wanted.kind == "clip":
        return Loaded(choice, clip=way.text_encoders(client, sources, wanted.type))
    return Loaded(choice, vae=way.vae(client, sources[0]))


def _local(wanted: Wanted, sources: Sequence[Source], choice: Choice) -> Loaded:
    for source in sources:
        if source.path is None:
            message = f"there is no file {source.name} in ComfyUI's folders; {choice}"
            raise refusal(ModelNotFound, message, "choose a file that is there, or start a broker that has it")
    from luna_broker.comfyui import local

    paths = [str(source.path) for source in sources]
    if wanted.kind == "checkpoint":
        return Loaded(choice, *local.checkpoint(paths[0], wanted.precision))
    if wanted.kind == "unet":
        return Loaded(choice, model=local.diffusion_model(paths[0], wanted.precision))
    if wanted.kind == "clip":
        return Loaded(choice, clip=local.text_encoders(paths, wanted.type))
    return Loaded(choice, vae=local.vae(paths[0]))


def _may_pass(error: LunaBrokerError) -> bool:
    """Whether the next prompt may have more luck; of an absent broker, `brokers.generation` tells."""
    # That class is made when torch is loaded, which may be after this module.
    return isinstance(error, (Busy, Timeout, luna_broker.OutOfMemory))


def _worker(wanted: Wanted) -> Worker:
    """What there is to know before anything is loaded. Raises `Timeout` for a broker that is busy beyond a deadline."""
    import comfy.model_management as mm
    import torch

    service = files.SERVICES[wanted.kind]
    broker = brokers.quick(wanted.address, brokers.DEADLINE_S).of(service)
    device = mm.vae_device() if wanted.kind == "vae" else mm.get_torch_device()
    is_on_gpu = device.type == "cuda"
    if is_on_gpu:
        # A GPU's rung is found with the first tensor there. Where it cannot be had, so is none.
        with contextlib.suppress(LunaBrokerError):
            broker.empty((1,), torch.uint8, device=device)
    where = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if is_on_gpu else "cpu"
    rungs = {rung.device.lower(): rung.rung for rung in broker.session.rungs}
    lanes = [lane["device"] for lane in broker.status()["lanes"] if lane["service"] == service]
    return Worker(
        is_on_gpu=is_on_gpu,
        rung=rungs.get(where.lower()),
        broker_is_on_gpu=any(lane != "cpu" for lane in lanes),
        missing=compat.missing("attached"),
    )
