"""The example workflows of the pack, in API format, with a place for each node. `pictures.py` makes files of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphs import Graph, Link, Node

Place = tuple[int, int, int, int]

# As ComfyUI's own templates name them, or as they may well be called.
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
UNET = "sd15-unet-fp16.safetensors"
TEXT_ENCODER = "clip_l.safetensors"
VAE = "sd15-vae.safetensors"
LORA = "ink wash.safetensors"
STYLE = "styles/film.safetensors"
PICTURE = "example.png"

PROMPT = "a lighthouse on a cliff above the sea, evening light, (detailed:1.1)"
NEGATIVE = "blurry, text, watermark"


@dataclass
class Example:
    """A workflow, where its nodes stand, and what its note says."""

    name: str
    note: str
    note_place: Place
    graph: Graph = field(default_factory=Graph)
    places: dict[str, Place] = field(default_factory=dict)

    def put(self, place: Place, kind: str, **inputs: Any) -> Node:
        node = self.graph.add(kind, **inputs)
        self.places[node.id] = place
        return node

    def sample(self, place: Place, model: Link, positive: Link, negative: Link, latent: Link, **sampler: Any) -> Link:
        settings = {"seed": 7, "steps": 8, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        return self.put(place, "KSampler", **links, **{**settings, **sampler}).out()


def examples() -> list[Example]:
    return [swapped_loader(), without_models(), gateway()]


def swapped_loader() -> Example:
    example = Example(
        "swap-the-loader",
        "# Swap the loader\n\nAll nodes but the loader are ComfyUI's own. **Load Checkpoint (Luna Broker)** says on"
        " itself whether the model is attached, remote or local, and why.\n\nStart a broker first: `luna-broker serve`."
        " Without one, the checkpoint is loaded as ever.",
        (20, 380, 330, 270),
    )
    loader = example.put((20, 20, 330, 310), "LunaBrokerCheckpointLoader", ckpt_name=CHECKPOINT, mode="auto")
    lora = example.put(
        (390, 20, 300, 130),
        "LoraLoader",
        model=loader.out(0),
        clip=loader.out(1),
        lora_name=LORA,
        strength_model=0.8,
        strength_clip=0.6,
    )
    positive = example.put((390, 200, 300, 130), "CLIPTextEncode", clip=lora.out(1), text=PROMPT).out()
    negative = example.put((390, 380, 300, 110), "CLIPTextEncode", clip=lora.out(1), text=NEGATIVE).out()
    latent = example.put((390, 540, 300, 110), "EmptyLatentImage", width=512, height=512, batch_size=1).out()
    sampled = example.sample((730, 20, 290, 270), lora.out(0), positive, negative, latent)
    image = example.put((730, 340, 290, 50), "VAEDecode", samples=sampled, vae=loader.out(2)).out()
    example.put((1060, 20, 400, 460), "SaveImage", images=image, filename_prefix="luna-broker")
    return example


def without_models() -> Example:
    example = Example(
        "worker-without-models",
        "# A worker without models\n\nText encoders, UNet and VAE are the broker's: this ComfyUI needs neither their"
        " files nor a GPU. Prompts and latents go out, latents and pictures come back.",
        (20, 350, 330, 220),
    )
    unet = example.put(
        (20, 20, 330, 200), "LunaBrokerUNETLoader", unet_name=UNET, mode="remote", on_failure="error"
    ).out()
    prompts = example.put(
        (390, 20, 320, 380),
        "LunaBrokerCLIPTextEncodeDual",
        positive=PROMPT,
        negative=NEGATIVE,
        clip_name1=TEXT_ENCODER,
        clip_name2="none",
        clip_skip=0,
    )
    picture = example.put((390, 450, 320, 314), "LoadImage", image=PICTURE).out()
    latent = example.put((750, 450, 290, 110), "LunaBrokerVAEEncode", pixels=picture, vae_name=VAE).out()
    sampled = example.sample((750, 20, 290, 270), unet, prompts.out(0), prompts.out(1), latent, denoise=0.25)
    image = example.put((750, 620, 290, 110), "LunaBrokerVAEDecode", samples=sampled, vae_name=VAE).out()
    example.put((1080, 20, 400, 460), "SaveImage", images=image, filename_prefix="luna-broker")
    return example


def gateway() -> Example:
    example = Example(
        "gateway-and-block-cache",
        "# LoRAs in the prompt\n\n`<lora:name:0.8:0.6>` applies a LoRA at 0.8 to the MODEL and at 0.6 to the CLIP."
        " One that is missing is skipped, and the gateway says so.\n\nSteps that begin much as the one before are left"
        " out by the broker's block cache.",
        (20, 520, 330, 260),
    )
    router = example.put(
        (20, 20, 330, 440),
        "LunaBrokerModelRouter",
        source="checkpoint",
        ckpt_name=CHECKPOINT,
        unet_name="none",
        clip_name1="none",
        clip_name2="none",
        vae_name="none",
        type="stable_diffusion",
        mode="remote",
    )
    configured = example.put(
        (390, 20, 380, 540),
        "LunaBrokerConfigGateway",
        model=router.out(0),
        clip=router.out(1),
        positive=f"{PROMPT} <lora:ink wash:0.8:0.6> <lora:film:0.4>",
        negative=NEGATIVE,
        cache_threshold=0.12,
        cache_start=0.1,
        cache_end=0.9,
        cache_max_hits=3,
    )
    latent = example.put((390, 620, 380, 110), "EmptyLatentImage", width=512, height=512, batch_size=1).out()
    sampled = example.sample(
        (810, 20, 290, 270), configured.out(0), configured.out(2), configured.out(3), latent, steps=20
    )
    image = example.put((810, 340, 290, 50), "VAEDecode", samples=sampled, vae=router.out(2)).out()
    example.put((1140, 20, 360, 420), "SaveImage", images=image, filename_prefix="luna-broker")
    example.put((810, 440, 290, 340), "PreviewAny", source=configured.out(7))
    status = example.put((1140, 490, 360, 130), "LunaBrokerStatus", after=image).out()
    example.put((1140, 680, 360, 200), "PreviewAny", source=status)
    return example
