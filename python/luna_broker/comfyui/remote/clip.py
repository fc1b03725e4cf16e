"""ComfyUI's CLIP around text encoders of the broker's: words become tokens here, and vectors there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import comfy.utils
import folder_paths
import torch
from luna_broker import Client, ModelNotFound, Unsupported
from luna_broker.comfyui.files import Source
from luna_broker.comfyui.remote import origins, refusals
from luna_broker.comfyui.remote.model import LOCALLY, Found
from luna_broker.comfyui.remote.patcher import ATTACHMENT, SIZE, Remote, RemotePatcher
from luna_broker.comfyui.remote.runs import Stack
from luna_broker.comfyui.remote.stacks import Stacks, check
from luna_broker.comfyui.remote.weights import Convert, Described, FileWeights, Header
from luna_broker.errors import refusal

# Types of ComfyUI's loaders under which these encoders are used as the broker uses them.
TYPES = ("stable_diffusion", "sdxl")

TOKENIZERS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("clip_l",): comfy.sd1_clip.SD1Tokenizer,
    ("clip_h",): comfy.text_encoders.sd2_clip.SD2Tokenizer,
    ("clip_g",): comfy.sdxl_clip.SDXLTokenizer,
    ("clip_g", "clip_l"): comfy.sdxl_clip.SDXLTokenizer,
}
ENCODERS = {
    comfy.sd.TEModel.CLIP_L: "clip_l",
    comfy.sd.TEModel.CLIP_H: "clip_h",
    comfy.sd.TEModel.CLIP_G: "clip_g",
}

POSITIONS = 77


class RemoteEncoders(Described):
    """Stands for the text encoders, as ComfyUI's CLIP calls them."""

    def __init__(self, client: Client, clip: Any, weights: FileWeights, dtype: torch.dtype) -> None:
        """`clip`: a `luna_broker.Clip` of `client`."""
        super().__init__(weights, dtype, "")
        self.dtypes = {dtype}
        self.stacks = Stacks(client, weights, dtype)
        self._clip = clip
        self._encoders = clip.info["clip"]["encoders"]
        self._options: dict[str, Any] = {}

    def reset_clip_options(self) -> None:
        self._options = {}

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        self._options.update(options)

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning and pooled row, float32. `tokens`: of each encoder, as ComfyUI's tokenizers give them."""
        kinds = [encoder["kind"].removeprefix("clip_") for encoder in self._encoders]
        wanted = {kind: tokens[kind] for kind in kinds}
        # An SD1 uses the pooled row as it is before the projection, whether or not its file has one.
        project = kinds != ["l"] and self._options.get("projected_pooled", True)
        skip = self._skip()

        def encode(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
            result = self._clip.encode_tokens(
                wanted, skip=skip, project=project, loras=stack, device=mm.intermediate_device()
            )
            check(self._clip.last.adapters)
            return result

        return self.stacks.ask(encode)

    def _skip(self) -> int | None:
        """Which block's result, counted from the end; `None` for what the encoders are used with."""
        layer = self._options.get("layer")
        if layer is None:
            return None
        depths = [encoder["layers"] for encoder in self._encoders]
        if layer < 0 and -layer <= min(depths):
            return -layer
        if layer < 0 and -layer > max(depths) and "clip_g" not in [encoder["kind"] for encoder in self._encoders]:
            # ComfyUI takes the last then, with the norm that these have on every one.
            return 1
        what = f"clip skip {layer} of encoders with {', '.join(map(str, depths))} blocks"
        raise refusal(Unsupported, f"the broker has no {what}; nothing was encoded", "choose one of fewer blocks")


class RemoteCLIP(comfy.sd.CLIP):
    """A CLIP of which only the encoders are elsewhere."""

    def __init__(self, encoders: RemoteEncoders, tokenizer: Any) -> None:
        super().__init__(no_init=True)
        self.cond_stage_model = encoders
        self.tokenizer = tokenizer
        self.patcher = RemotePatcher(encoders, mm.text_encoder_device(), mm.text_encoder_offload_device(), size=SIZE)
        self.patcher.set_attachments(ATTACHMENT, Remote(encoders.weights, encoders.stacks))
        self.patcher.is_clip = True
        self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.layer_idx = None
        self.use_clip_schedule = False
        self.tokenizer_options: dict[str, Any] = {}
        self.apply_hooks_to_conds = None

    def clone(self) -> RemoteCLIP:
        copy = super().clone()
        copy.__class__ = type(self)
        return copy

    def get_sd(self) -> Any:
        raise refusals.reading("The text encoders' weights")

    def load_sd(self, sd: Any, full_model: bool = False) -> Any:
        raise refusals.reading("The text encoders' weights")


def of_checkpoint(client: Client, found: Found) -> RemoteCLIP | None:
    """The text encoders of a checkpoint; `None` where it has none."""

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _named(found.config.process_clip_state_dict(dict(tensors)))

    weights = FileWeights(client.of("clip"), [found.source], [found.header], convert)
    if not weights.shapes:
        return None
    return _build(client, found.source.ask(client.clip), weights)


def of_files(client: Client, sources: Sequence[Source], kind: str) -> RemoteCLIP:
    """Text encoders that come alone, one in each file. Raises `Unsupported` for other than the CLIP kind."""
    names = ", ".join(source.name for source in sources)
    if kind.lower() not in TYPES:
        raise refusal(Unsupported, f"{names} as type {kind} is nothing the broker encodes with", LOCALLY)
    broker = client.of("clip")
    headers: list[Header] = [source.ask(broker.header) for source in sources]
    weights = FileWeights(broker, sources, headers, _convert(names))
    try:
        clip = client.clip(*(source.path or source.name for source in sources))
    except ModelNotFound:
        clip = client.clip(*(source.name for source in sources))
    return _build(client, clip, weights)


def _build(client: Client, clip: Any, weights: FileWeights) -> RemoteCLIP:
    origins.install()
    encoders = clip.info["clip"]["encoders"]
    kinds = tuple(sorted(encoder["kind"] for encoder in encoders))
    if kinds not in TOKENIZERS:
        raise refusal(Unsupported, f"ComfyUI has no tokenizer for {' and '.join(kinds)} together", LOCALLY)
    lengths = {f"{each['kind']}_max_length": each["tokens"] for each in encoders if each["tokens"] != POSITIONS}
    tokenizer = TOKENIZERS[kinds](
        embedding_directory=folder_paths.get_folder_paths("embeddings"), tokenizer_data=lengths
    )
    dtype = mm.text_encoder_dtype(mm.text_encoder_device())
    return RemoteCLIP(RemoteEncoders(client.of("clip"), clip, weights, dtype), tokenizer)


def _convert(names: str) -> Convert:
    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = dict(tensors)
        if "transformer.resblocks.0.ln_1.weight" in tensors:
            tensors = comfy.utils.clip_text_transformers_convert(tensors, "", "")
        elif "text_projection" in tensors:
            tensors["text_projection.weight"] = tensors.pop("text_projection").transpose(0, 1)
        encoder = ENCODERS.get(comfy.sd.detect_te_model(tensors))
        if encoder is None:
            raise refusal(Unsupported, f"{names} has no text encoder of the CLIP kind; nothing was loaded", LOCALLY)
        return _named({f"{encoder}.transformer.{key}": tensor for key, tensor in tensors.items()})

    return convert


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what a file may have that ComfyUI's module has not."""
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".position_ids")}
