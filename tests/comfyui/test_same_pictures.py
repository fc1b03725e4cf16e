"""With the loader swapped, every kind of workflow gives what it gives with stock loaders."""

from __future__ import annotations

from functools import partial

import checkpoints
import pytest
import workflows
from compare import assert_different
from workflows import txt2img

import broker as brokers

ADAPTERS = {kind: (f"{kind}.safetensors", 0.6, 0.5) for kind in checkpoints.KINDS}
LONG_PROMPT = ", ".join(["a house by the (sea:1.2) under a cloudy sky"] * 12)

WORKFLOWS = {
    "txt2img-euler": partial(txt2img, sampler_name="euler"),
    "txt2img-dpmpp_2m": partial(txt2img, sampler_name="dpmpp_2m", scheduler="karras"),
    "txt2img-heun": partial(txt2img, sampler_name="heun"),
    "txt2img-uni_pc": partial(txt2img, sampler_name="uni_pc"),
    "txt2img-without-guidance": partial(txt2img, cfg=1.0),
    "img2img": workflows.img2img,
    "inpaint": workflows.inpaint,
    "inpaint-model": workflows.inpaint_model,
    **{f"lora-{kind}": partial(txt2img, loras=[adapter]) for kind, adapter in ADAPTERS.items()},
    "lora-stack": partial(txt2img, loras=list(ADAPTERS.values())),
    "clip-skip": partial(txt2img, clip_skip=-3),
    "long-prompt": partial(txt2img, positive=LONG_PROMPT),
    "textual-inversion": partial(txt2img, positive="a house in the style of (embedding:tiny:1.1)"),
    "controlnet": workflows.controlnet,
    "tiled-vae": workflows.tiled_vae,
    "hooks": workflows.hooks,
    "guidance": workflows.guidance,
    "easy-cache": workflows.easy_cache,
    "separate-files": workflows.separate_files,
    "merged": workflows.merged,
    "sdxl": workflows.sdxl,
    "refiner": workflows.refiner,
}
VAE_ONLY = {"tiled-vae"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_remote_within_one_step_of_eight_bits(name, side, broker, loaders):
    before = brokers.completed(broker)
    result = side("remote").check(WORKFLOWS[name], loaders("remote"))
    asked = {service for service, count in brokers.completed(broker).items() if count > before[service]}
    # Prompts that ComfyUI has kept from the workflow before are not encoded again.
    assert asked >= ({"vae"} if name in VAE_ONLY else {"unet", "vae"}), f"only {asked} ran in the broker"
    assert "remote" in result.text, result.text


@pytest.mark.parametrize("name", WORKFLOWS)
def test_attached_bit_for_bit(name, side, broker, loaders):
    before = brokers.completed(broker)
    result = side("attached").check(WORKFLOWS[name], loaders("attached"))
    assert "attached" in result.text and brokers.holds_weights(broker, side("attached").worker.pid), result.text
    after = brokers.completed(broker)
    assert (after["unet"], after["clip"]) == (before["unet"], before["clip"]), "the broker computed"


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in ("txt2img-euler", *VAE_ONLY)])
def test_the_workflows_differ(name, side):
    """Otherwise what sets a workflow apart was not compared at all."""
    reference = side("attached").reference
    plain, other = reference(WORKFLOWS["txt2img-euler"]), reference(WORKFLOWS[name])
    if plain.tensor("latent").shape == other.tensor("latent").shape:
        assert_different(other, plain)
