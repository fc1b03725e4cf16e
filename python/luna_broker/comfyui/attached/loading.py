"""ComfyUI's own loaders, given the broker's tensors: models, text encoders and VAEs whose weights are shared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import torch
from luna_broker import Client, Unsupported, Weights
from luna_broker.comfyui import compat
from luna_broker.comfyui.attached import dtypes
from luna_broker.comfyui.attached.assign import attaching
from luna_broker.comfyui.attached.audit import Audit, Span, audit
from luna_broker.comfyui.attached.dtypes import LOCALLY, Part
from luna_broker.comfyui.attached.merged import MergedSets
from luna_broker.comfyui.attached.patcher import ATTACHMENT, AttachedPatcher, Holding
from luna_broker.comfyui.attached.permits import AttachedVAE
from luna_broker.comfyui.attached.reattach import Renewal
from luna_broker.comfyui.files import Source
from luna_broker.errors import refusal

_LOG = logging.getLogger("luna_broker")

Tensors = dict[str, torch.Tensor]


def checkpoint(client: Client, source: Source, precision: str) -> tuple[Any, Any, Any]:
    """See the package."""
    _refuse_unknown(source.name)
    broker = client.of("unet")
    parts = dtypes.checkpoint(source.name, source.ask(broker.header), precision)
    tensors, weights = _attach(broker, source, [parts.unet, parts.clip, parts.vae])
    cast_later = frozenset(id(tensor) for key, tensor in tensors.items() if key.startswith(parts.vae.prefixes))
    with attaching(_spans(weights), cast_later):
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            tensors,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options={"dtype": parts.unet.dtype},
            te_model_options={"initial_device": torch.device("cpu")},
        )
    _finish(client, broker, source, weights, model=model, clip=clip, vae=vae)
    return model, clip, vae


def diffusion_model(client: Client, source: Source, precision: str) -> Any:
    """See the package."""
    _refuse_unknown(source.name)
    broker = client.of("unet")
    part = dtypes.diffusion_model(source.name, source.ask(broker.header), precision)
    tensors, weights = _attach(broker, source, [part])
    with attaching(_spans(weights)):
        model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": part.dtype})
    if model is None:
        raise refusal(Unsupported, f"ComfyUI knows no diffusion model like {source.name}; nothing was loaded", LOCALLY)
    _finish(client, broker, source, weights, model=model)
    return model


def text_encoders(client: Client, sources: Sequence[Source], kind: str) -> Any:
    """See the package."""
    names = ", ".join(source.name for source in sources)
    _refuse_unknown(names)
    broker = client.of("clip")
    part = dtypes.text_encoder()
    found = [_attach(broker, source, [part]) for source in sources]
    weights = [each for _, held in found for each in held]
    with attaching(_spans(weights)):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [tensors for tensors, _ in found],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options={"initial_device": torch.device("cpu")},
        )
    _finish(client, broker, Source(names, None), weights, clip=clip)
    return clip


def vae(client: Client, source: Source) -> Any:
    """See the package."""
    _refuse_unknown(source.name)
    broker = client.of("vae")
    tensors, weights = _attach(broker, source, [dtypes.vae()])
    with attaching(_spans(weights), frozenset(map(id, tensors.values()))):
        made = comfy.sd.VAE(sd=tensors)
    made.throw_exception_if_invalid()
    _finish(client, broker, source, weights, vae=made)
    return made


def _refuse_unknown(name: str) -> None:
    """Raises `Unsupported` where this ComfyUI is not one that weights can be shared with."""
    against = list(compat.missing("attached"))
    if not against and mm.force_channels_last():
        against.append("--force-channels-last lays weights out anew")
    if not against and mm.is_intel_xpu():
        against.append("IPEX lays weights out anew")
    if against:
        raise refusal(Unsupported, f"{name} cannot be attached in this ComfyUI: {', '.join(against)}", LOCALLY)


def _attach(broker: Client, source: Source, parts: Sequence[Part]) -> tuple[Tensors, list[Weights]]:
    """The tensors of a file, each in its part's type and on its part's device; others as they are stored."""
    types: dict[str, torch.dtype | str | None] = {"": None}
    devices: dict[str, torch.device] = {"": parts[0].device}
    for part in parts:
        types.update(dict.fromkeys(part.prefixes, part.converted_to))
        devices.update(dict.fromkeys(part.prefixes, part.device))

    def belongs_on(key: str) -> torch.device:
        return devices[max((prefix for prefix in devices if key.startswith(prefix)), key=len)]

    held = []
    tensors: Tensors = {}
    for device in dict.fromkeys(devices.values()):

        def ask(name: str, where: str | None = None if device.type == "cpu" else str(device)) -> Weights:
            return broker.attach(name, dtype=types, device=where, progress=_progress())

        weights = source.ask(ask)
        tensors.update({key: tensor for key, tensor in weights.items() if belongs_on(key) == device})
        held.append(weights)
    return tensors, held


def _progress() -> Callable[[int, int], object]:
    """ComfyUI's progress bar, which also ends the wait once Cancel was pressed."""
    bars: list[comfy.utils.ProgressBar] = []

    def moved(done: int, total: int) -> None:
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return moved


def _spans(weights: Sequence[Weights]) -> list[Span]:
    return [each._held().span for each in weights]


def _finish(
    client: Client,
    broker: Client,
    source: Source,
    weights: Sequence[Weights],
    model: Any = None,
    clip: Any = None,
    vae: Any = None,
) -> None:
    """Gives patchers what they hold, has the VAE ask for permits, and looks whether all of it is shared."""
    patchers = {
        "unet": model,
        "clip": None if clip is None else clip.patcher,
        "vae": None if vae is None or vae.first_stage_model is None else vae.patcher,
    }
    patchers = {part: patcher for part, patcher in patchers.items() if patcher is not None}
    strange = {type(patcher).__name__ for patcher in patchers.values() if type(patcher) is not AttachedPatcher}
    if strange:
        message = f"{source.name} cannot be attached: this ComfyUI has patchers of its own: {', '.join(strange)}"
        raise refusal(Unsupported, message, LOCALLY)
    renewal = Renewal(weights)
    base = " ".join(each.digest for each in weights)
    for patcher in patchers.values():
        sets = MergedSets(broker, base, patcher.load_device, _computed_by(patcher.load_device))
        patcher.set_attachments(ATTACHMENT, Holding(renewal, sets))
    if "vae" in patchers:
        vae.__class__ = AttachedVAE
        vae.luna_client = _lane(client)
    _tell(source.name, audit({f"{part}.": patcher.model for part, patcher in patchers.items()}, _spans(weights)))


def _lane(client: Client) -> Client | None:
    """Who gives permits; `None` where no broker was named for VAEs."""
    try:
        return client.of("vae")
    except Unsupported:
        return None


def _computed_by(device: torch.device) -> str:
    """What the bytes of a merge depend on besides weights and patches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"ComfyUI {compat.version()}, torch {torch.__version__}, {name}"


def _tell(name: str, found: Audit) -> None:
    level = logging.WARNING if found.private else logging.INFO
    _LOG.log(level, "luna-broker: %s attached: %s", name, found)
