"""Runs cases within one process that has ComfyUI's own models and remote ones, and prints how far apart they are.

A program of its own, as the tests beside it have modules of the same names as ComfyUI. Prints a line of JSON for each
case: its name, and either differences by name or an error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, as it is what makes ComfyUI's modules be found.
from stage import ARGUMENTS, CASES, CLIENT, MODELS, Results, case, encode, models, off, painted, sample, source

# isort: split
import comfy.hooks
import comfy.sd
import comfy.utils
import luna_broker
import nodes
import torch
from comfy_extras import (
    nodes_attention_multiply,
    nodes_easycache,
    nodes_freelunch,
    nodes_model_advanced,
    nodes_model_merging,
)
from luna_broker.comfyui import remote

KINDS = ("lora", "locon", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "bias")


@case
def samplers(is_remote: bool) -> Results:
    model, clip, vae = models("small.safetensors", is_remote)
    names = ("euler", "dpmpp_2m_sde", "heun", "uni_pc")
    found = {name: painted(model, clip, sampler=name) for name in names}
    found["batch"] = painted(model, clip, latent={"samples": torch.zeros(3, 4, 8, 8)})
    found["cfg_1"] = painted(model, clip, cfg=1.0)
    found["image"] = vae.decode(found["euler"])
    return found


@case
def adapters(is_remote: bool) -> Results:
    model, clip, _ = models("small.safetensors", is_remote)
    found = {"none": painted(model, clip)}
    loader = nodes.LoraLoader()
    for kind in KINDS:
        adapted = loader.load_lora(model, clip, f"{kind}.safetensors", 0.8, 0.6)
        found[kind] = painted(*adapted)
    stacked = (model, clip)
    for kind, strength in (("lora", 0.8), ("glora", -0.5), ("dora", 0.7), ("second", 0.8), ("oft", 0.4)):
        stacked = loader.load_lora(*stacked, f"{kind}.safetensors", strength, strength)
    found["stack"] = painted(*stacked)
    found["none_again"] = painted(model, clip)
    return found


@case
def text(is_remote: bool) -> Results:
    _, clip, _ = models("small.safetensors", is_remote)
    found = {}
    prompts = {
        "plain": "a cat",
        "weighted": "a (cat:1.4) and [dog]",
        "long": "word " * 120,
        "inverted": "a photo of embedding:tiny in (snow:0.7)",
    }
    for name, prompt in prompts.items():
        [[cond, more]] = encode(clip, prompt)
        found[name], found[f"{name}.pooled"] = cond, more["pooled_output"]
    for skip in (-1, -2, -3, -12, -24):
        skipped = clip.clone()
        skipped.clip_layer(skip)
        [[found[f"skip{skip}"], _]] = encode(skipped, "a (cat:1.2)")
    [[_, more]] = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"), unprojected=True)
    found["unprojected"] = more["pooled_output"]
    return found


@case
def vaes(is_remote: bool) -> Results:
    path = "vae/kl.safetensors"
    if is_remote:
        vae = remote.vae(CLIENT, source(path))
    else:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / path)))
    torch.manual_seed(0)
    pixels = torch.rand(2, 72, 137, 4)
    mask = (torch.rand(1, 72, 137) > 0.7).float()
    turned = torch.rand(1, 3, 64, 96).movedim(1, -1)
    latent = vae.encode(pixels[:, :, :, :3])
    return {
        "encode": latent,
        "alpha": nodes.VAEEncode().encode(vae, pixels)[0]["samples"],
        "strided": vae.encode(turned),
        "inpaint": nodes.VAEEncodeForInpaint().encode(vae, pixels[:1, :, :, :3], mask)[0]["samples"],
        "image_decode": vae.decode(latent),
        "encode_tiled": vae.encode_tiled(pixels[:, :, :, :3], tile_x=64, tile_y=64, overlap=16),
        "image_tiled": vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2),
        "image_tiled_default": vae.decode_tiled(latent),
    }


@case
def hooks(is_remote: bool) -> Results:
    model, clip, _ = models("small.safetensors", is_remote)
    lora = comfy.utils.load_torch_file(str(MODELS / "loras/lora.safetensors"))
    group = comfy.hooks.create_hook_lora(lora, 0.9, 0.7)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
    group.set_keyframes_on_hooks(keyframes)
    found = {}
    for schedule in (False, True):
        hooked = nodes_hooks_apply(clip, group, schedule)
        found[f"schedule_{schedule}"] = sample(model, encode(hooked, "a house"), encode(clip, "blurry"))
    found["after"] = painted(model, clip)
    return found


def nodes_hooks_apply(clip: Any, group: Any, schedule: bool) -> Any:
    from comfy_extras.nodes_hooks import SetClipHooks

    return SetClipHooks().apply_hooks(clip, schedule, True, group)[0]


@case
def controlled(is_remote: bool) -> Results:
    model, clip, vae = models("small.safetensors", is_remote)
    (control,) = nodes.ControlNetLoader().load_controlnet("small.safetensors")
    torch.manual_seed(1)
    positive, negative = encode(clip, "a house"), encode(clip, "blurry")
    found = {}
    for batch, pictures in ((1, 1), (2, 1), (2, 2)):
        image = torch.rand(pictures, 64, 128, 3)
        both = nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, image, 0.8, 0.0, 0.9)
        latent = {"samples": torch.zeros(batch, 4, 8, 16)}
        found[f"{batch}_{pictures}"] = sample(model, *both, latent=latent)
    return found


@case
def around(is_remote: bool) -> Results:
    """What changes sampling but not the network, and merging, which changes weights."""
    model, clip, _ = models("small.safetensors", is_remote)
    (sampling,) = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)
    (rescaled,) = nodes_model_advanced.RescaleCFG().patch(sampling, 0.7)
    found = {"rescaled": painted(rescaled, clip)}
    cached = nodes_easycache.EasyCacheNode.execute(model, 0.5, 0.1, 0.95, False)[0]
    found["easy_cache"] = painted(cached, clip, steps=8)
    other, other_clip, _ = models("other.safetensors", is_remote)
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(model, other, 0.6)
    found["merged"] = painted(merged, clip)
    multiplied = nodes_attention_multiply.UNetCrossAttentionMultiply.execute(model, 1.1, 0.9, 1.2, 1.0)[0]
    found["multiplied"] = painted(multiplied, clip)
    text_multiplied = nodes_attention_multiply.CLIPAttentionMultiply.execute(clip, 1.1, 0.9, 1.2, 1.0)[0]
    found["text_multiplied"] = painted(model, text_multiplied)
    return found


@case
def inpainting(is_remote: bool) -> Results:
    path = "diffusion_models/inpaint.safetensors"
    if is_remote:
        model = remote.diffusion_model(CLIENT, source(path), "auto")
        clip = remote.text_encoders(CLIENT, [source("text_encoders/clip_l.safetensors")], "stable_diffusion")
        vae = remote.vae(CLIENT, source("vae/kl.safetensors"))
    else:
        model = comfy.sd.load_diffusion_model(str(MODELS / path))
        clip = comfy.sd.load_clip([str(MODELS / "text_encoders/clip_l.safetensors")])
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae/kl.safetensors")))
    torch.manual_seed(2)
    pixels, mask = torch.rand(1, 64, 64, 3), (torch.rand(1, 64, 64) > 0.5).float()
    encoded = nodes.InpaintModelConditioning().encode(
        encode(clip, "a house"), encode(clip, "blurry"), pixels, vae, mask, True
    )
    return {"latent": sample(model, *encoded[:2], latent=encoded[2])}


@case
def xl(is_remote: bool) -> Results:
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    model, clip, _ = models("sdxl.safetensors", is_remote)
    sizes = {"width": 640, "height": 512, "crop_w": 16, "crop_h": 8, "target_width": 512, "target_height": 384}
    coder = CLIPTextEncodeSDXL()
    positive = coder.execute(clip=clip, text_g="many words, " * 45, text_l="a (cat:1.2)", **sizes)[0]
    negative = coder.execute(clip=clip, text_g="blurry", text_l="blurry", **sizes)[0]
    found = {"latent": sample(model, positive, negative, latent={"samples": torch.zeros(1, 4, 16, 16)})}
    found["cond"], found["pooled"] = positive[0][0], positive[0][1]["pooled_output"]
    skipped = clip.clone()
    skipped.clip_layer(-3)
    [[found["skipped"], _]] = encode(skipped, "a cat")
    return found


def refused(change: Callable[[Any], Any]) -> str:
    """What a remote model says to a patch."""
    model, clip, _ = models("small.safetensors", True)
    try:
        painted(change(model), clip)
    except luna_broker.Unsupported as error:
        return str(error)
    return "nothing"


@case
def refusals(is_remote: bool) -> dict[str, Any]:
    if not is_remote:
        return {}
    from comfy_extras import nodes_hypertile, nodes_pag

    def replaced(model: Any) -> Any:
        patched = model.clone()
        patched.add_object_patch("diffusion_model", torch.nn.Identity())
        return patched

    def overridden(model: Any) -> Any:
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = lambda *a, **k: None
        return patched

    said = {
        "freeu": refused(lambda model: nodes_freelunch.FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]),
        "pag": refused(lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]),
        "hypertile": refused(lambda model: nodes_hypertile.HyperTile.execute(model, 32, 1, 0, False)[0]),
        "object": refused(replaced),
        "override": refused(overridden),
    }
    model, clip, vae = models("small.safetensors", True)
    for name, read in (
        ("save_model", lambda: model.model.state_dict_for_saving()),
        ("save_clip", clip.get_sd),
        ("save_vae", vae.get_sd),
    ):
        try:
            said[name] = f"nothing: {read()}"
        except luna_broker.Unsupported as error:
            said[name] = str(error)
    before = painted(model, clip)
    said["control_lora"] = control_lora(model, clip)
    said["after"] = off(painted(model, clip), before)
    return said


def control_lora(model: Any, clip: Any) -> str:
    """What is said where a Control-LoRA takes the weights it builds on from the model."""
    import comfy.controlnet

    control = comfy.controlnet.ControlLora({"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)})
    hint = torch.zeros(1, 64, 128, 3)
    both = nodes.ControlNetApplyAdvanced().apply_controlnet(
        encode(clip, "a house"), encode(clip, "blurry"), control, hint, 1.0, 0.0, 1.0
    )
    try:
        sample(model, *both)
    except luna_broker.Unsupported as error:
        return str(error)
    return "nothing"


class Watched:
    """A Unet that counts what is asked of it."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.opened: list[dict[str, Any]] = []
        self.contexts: list[bool] = []

    def run(self, **options: Any) -> Any:
        self.opened.append(options)
        return WatchedRun(self, self.unet.run(**options))


class WatchedRun:
    """One of its runs."""

    def __init__(self, unet: Watched, run: Any) -> None:
        self.unet, self.run = unet, run
        self.adapters, self.close = run.adapters, run.close

    def __call__(self, x: Any, timesteps: Any, context: Any = None, **more: Any) -> Any:
        self.unet.contexts.append(context is not None)
        return self.run(x, timesteps, context, **more)


def watched(do: Callable[[], Any]) -> Watched:
    runs = models("small.safetensors", True)[0].model.diffusion_model.runs
    watching = Watched(runs._unet)
    runs._unet = watching
    try:
        do()
    finally:
        runs._unet = watching.unet
    return watching


@case
def economy(is_remote: bool) -> dict[str, Any]:
    """What crosses, and how often."""
    if not is_remote:
        return {}
    model, clip, _ = models("small.safetensors", True)
    plain = watched(lambda: painted(model, clip, steps=6))
    cached = watched(lambda: painted(remote.with_block_cache(model, 0.5, 0.1, 0.9, 3), clip, steps=6))
    named = nodes.LoraLoader().load_lora(model, clip, "lora.safetensors", 0.8, 0.6)
    by_name = watched(lambda: painted(*named))
    file = comfy.utils.load_torch_file(str(MODELS / "loras/lora.safetensors"))
    copies = {key: tensor.clone() for key, tensor in file.items()}
    unnamed = comfy.sd.load_lora_for_models(model, clip, copies, 0.8, 0.6)
    again = comfy.sd.load_lora_for_models(model, clip, copies, 0.4, 0.6)
    by_upload = watched(lambda: (painted(*unnamed), painted(*again), painted(*unnamed)))
    return {
        "runs": len(plain.opened),
        "contexts": sum(plain.contexts),
        "steps": len(plain.contexts),
        "left_open": model.model.diffusion_model.runs.open,
        "cache": cached.opened[0]["fb_cache"],
        "sigmas": len(cached.opened[0]["sigmas"]),
        "by_name": [Path(name).name for name, _ in by_name.opened[0]["loras"]],
        "by_upload": [
            [name.rpartition("-")[0], strength] for run in by_upload.opened for name, strength in run["loras"]
        ],
        "uploads": sum(
            name.startswith("comfyui-patches-") for weights in CLIENT.status()["weights"] for name in weights["names"]
        ),
    }


@case
def restart(is_remote: bool) -> dict[str, Any]:
    """The broker is killed after a picture with patches that it was sent, and started again."""
    binary = os.environ.get("LUNA_BROKER_BIN")
    if not is_remote or not binary:
        return {}
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "demo"))
    from broker_process import BrokerProcess

    with tempfile.TemporaryDirectory(prefix="luna-") as folder:
        broker = BrokerProcess(binary, Path(folder) / "own.sock", ["--device", "cpu"]).start()
        try:
            client = luna_broker.connect(broker.address)
            model, clip, _ = remote.checkpoint(client, source("checkpoints/small.safetensors"))
            file = comfy.utils.load_torch_file(str(MODELS / "loras/lora.safetensors"))
            copies = {key: tensor.clone() for key, tensor in file.items()}
            patched = comfy.sd.load_lora_for_models(model, clip, copies, 0.8, 0.6)
            before = painted(*patched)
            broker.kill()
            try:
                painted(*patched)
                said = "nothing"
            except luna_broker.LunaBrokerError as error:
                said = type(error).__name__
            broker = BrokerProcess(binary, Path(folder) / "own.sock", ["--device", "cpu"]).start()
            return {"without": said, "after": off(painted(*patched), before)}
        finally:
            broker.kill()


def main() -> None:
    for name in ARGUMENTS.cases or CASES:
        line: dict[str, Any] = {"case": name}
        try:
            with torch.inference_mode():
                expected, got = CASES[name](False), CASES[name](True)
            if expected:
                line["off"] = {key: off(got[key], expected[key]) for key in expected}
                line["size"] = {key: float(expected[key].abs().max()) for key in expected}
                first = next(iter(expected))
                apart = [key for key in expected if key not in (first, "none_again")]
                line["apart"] = {
                    key: off(expected[key], expected[first])
                    for key in apart
                    if expected[key].shape == expected[first].shape
                }
            else:
                line["said"] = got
        except Exception:
            line["error"] = traceback.format_exc()
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
