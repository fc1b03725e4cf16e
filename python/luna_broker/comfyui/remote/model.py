"""ComfyUI's model around a UNet of the broker's: everything real but the network."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_detection as detection
import comfy.model_management as mm
import comfy.supported_models as families
import comfy.utils
from luna_broker import Client, Unsupported
from luna_broker.comfyui.attached.dtypes import PRECISIONS
from luna_broker.comfyui.files import Source
from luna_broker.comfyui.remote import origins
from luna_broker.comfyui.remote.patcher import ATTACHMENT, SIZE, Remote, RemotePatcher
from luna_broker.comfyui.remote.unet import PREFIX, RemoteUNet
from luna_broker.comfyui.remote.weights import FileWeights, Header, described
from luna_broker.errors import refusal
from torch import Tensor

_LOG = logging.getLogger("luna_broker")

LOCALLY = "load it with mode local"

# What the broker calls what a network predicts, and what ComfyUI does.
PREDICTIONS = {"eps": "EPS", "v": "V_PREDICTION", "edm": "EDM", "v-edm": "V_PREDICTION_EDM"}

# Keys beside the weights by which ComfyUI tells how an SDXL was trained.
MARKS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "v_pred", "ztsnr")


@dataclass(frozen=True)
class Found:
    """What ComfyUI makes of a file by its header."""

    source: Source
    header: Header
    config: families.BASE
    keys: dict[str, str]
    """Of the file, for each of the network's."""
    parameters: int
    stored: Any
    """Element type of most weights."""


def detect(client: Client, source: Source) -> Found:
    """Asks ComfyUI's own detection about a file. Raises `Unsupported` where it knows no diffusion model like it."""
    header = source.ask(client.of("unet").header)
    tensors = described(header)
    prefix = detection.unet_prefix_from_state_dict(tensors)
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
    config = detection.model_config_from_unet(tensors, prefix)
    keys = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix)}
    if config is None and not prefix:
        config = detection.model_config_from_diffusers_unet(tensors)
        if config is not None:
            names = comfy.utils.unet_to_diffusers(config.unet_config)
            keys = {own: theirs for theirs, own in names.items() if theirs in tensors}
    if config is None:
        message = f"ComfyUI knows no diffusion model like that in {source.name}; nothing was loaded"
        raise refusal(Unsupported, message, LOCALLY)
    parameters = comfy.utils.calculate_parameters(tensors, prefix)
    return Found(source, header, config, keys, parameters, comfy.utils.weight_dtype(tensors, prefix))


def build(client: Client, found: Found, precision: str = "auto") -> RemotePatcher:
    """A ModelPatcher whose network is the broker's. `precision`: of what is sent; the broker's own is its affair."""
    origins.install()
    broker = client.of("unet")
    unet = found.source.ask(client.unet)
    config = found.config
    dtype = PRECISIONS[precision]
    if dtype is None:
        supported = list(config.supported_inference_dtypes)
        dtype = mm.unet_dtype(model_params=found.parameters, supported_dtypes=supported, weight_dtype=found.stored)
    else:
        _LOG.warning("luna-broker: %s: precision is what is sent in; the broker computes in its own", found.source.name)
    config.set_inference_dtype(
        dtype, mm.unet_manual_cast(dtype, mm.get_torch_device(), config.supported_inference_dtypes)
    )
    config.unet_config["disable_unet_model_creation"] = True

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        network = {own: tensors[key] for own, key in found.keys.items() if key in tensors}
        return {f"{PREFIX}{key}": tensor for key, tensor in config.process_unet_state_dict(network).items()}

    weights = FileWeights(broker, [found.source], [found.header], convert)
    _decide(config, found, unet.info["unet"], broker)
    model = config.get_model({}, "", device=mm.unet_offload_device())
    model.diffusion_model = RemoteUNet(broker, unet, weights, dtype)
    # The memory that a step takes is not of this process's device.
    model.memory_required = lambda *_shapes, **_more: 0
    patcher = RemotePatcher(model.eval(), mm.get_torch_device(), mm.unet_offload_device(), size=SIZE)
    network = model.diffusion_model
    patcher.set_attachments(ATTACHMENT, Remote(weights, network.stacks, network.runs))
    return patcher


def _decide(config: families.BASE, found: Found, facts: dict[str, Any], broker: Client) -> None:
    """Has the model be of the type that the broker found: ComfyUI looks at values of weights, which are not here."""
    prediction = facts["prediction"]
    if prediction not in PREDICTIONS:
        message = f"{found.source.name} predicts {prediction!r}, which this node pack does not know; nothing was loaded"
        raise refusal(Unsupported, message, LOCALLY)
    decided = comfy.model_base.ModelType[PREDICTIONS[prediction]]
    if prediction in ("edm", "v-edm"):
        # Sets the latent format and the range of noise besides.
        config.model_type(_marks(found, broker), "")
    if facts["zero_terminal_snr"]:
        config.sampling_settings["zsnr"] = True
    config.model_type = lambda *_arguments, **_options: decided


def _marks(found: Found, broker: Client) -> dict[str, Tensor]:
    marks = [key for key in MARKS if key in found.header]
    headers = {key: found.header[key] for key in marks}
    weights = FileWeights(broker, [found.source], [headers], lambda tensors: {key: tensors[key] for key in marks})
    return {key: weights[key] for key in marks}
