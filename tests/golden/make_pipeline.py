"""Writes small whole checkpoints and adapters for them, with what diffusers' pipelines make of a prompt.

    python tests/golden/make_pipeline.py FOLDER

needs what `make_unet.py`, `make_vae.py` and `make_clip.py` need, and writes into FOLDER/pipeline. `MODEL.safetensors`
is a checkpoint with UNet, VAE and text encoders, whose vocabulary is CLIP's own; `MODEL.ADAPTER.safetensors` is an
adapter under kohya's names. `MODEL.io.safetensors` has the `noise`, what text encoders make of the prompts
(`positive.cond`, `negative.pooled` and so on), and for each case the latent after all steps, `CASE.latent`, and
sometimes the picture, `CASE.image`. `cases.json` says what a case is: its model, sampler, adapters, and what the output
of the UNet means.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from make_clip import encoder, open_clip_names, transformers_names, without_projection
from make_lora import Draw, changed, kohya, lora
from make_unet import early, half, late, single_file, under, write
from make_vae import centre, kl, round_to, to_ldm

# Texts of which clip_tokens.json has the numbers.
POSITIVE = "Greg Rutkowski, Alphonse Mucha, trending on artstation, by Studio Ghibli"
NEGATIVE = "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped"
VOCABULARY, LENGTH = 49408, 77
START, END = VOCABULARY - 2, VOCABULARY - 1
STEPS, GUIDANCE = 20, 7.0
# Height and width of the latent; a VAE of four levels makes pictures eight times as large.
SIZE, RATIO = (12, 16), 8


def numbers(text: str, pad: int) -> torch.Tensor:
    known = dict(json.loads(Path(__file__).with_name("clip_tokens.json").read_text()))
    words = known[text]
    return torch.tensor([[START, *words, END] + [pad] * (LENGTH - 2 - len(words))])


def autoencoder(seed: int, scale: float):
    config = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4}
    model = round_to(kl(seed, scaling_factor=scale, **config), torch.half)
    # The usual start is for latents of variance one; those of a UNet that learnt nothing are larger.
    centre(model.decoder.conv_out, lambda latent: model.decode(5 * latent).sample, 4, 0.4, 0.0)
    return round_to(model, torch.half)


class Sampler:
    """Both schedulers take the steps that diffusers calls trailing, and both start from noise of the same size."""

    def __init__(self, name: str, prediction: str, zero_terminal_snr: bool):
        shared = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": prediction,
            # Of other spacings; only named because the pipelines warn where it is missing.
            "steps_offset": 1,
            "rescale_betas_zero_snr": zero_terminal_snr,
        }
        multistep = DPMSolverMultistepScheduler(timestep_spacing="trailing", **shared)
        self.arguments = {"num_inference_steps": STEPS}
        self.scheduler = multistep
        if name == "euler":
            multistep.set_timesteps(STEPS)
            self.arguments = {"timesteps": multistep.timesteps.tolist()}
            # With this spacing the variance of the noise includes that of a picture; the steps are given.
            self.scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **shared)


class Model:
    def __init__(self, name: str, folder: Path, seed: int, unet, vae, encoders: list):
        self.name, self.folder, self.unet, self.vae, self.encoders = name, folder, unet, vae, encoders
        self.weights = {key: value.double() for key, value in unet.state_dict().items()}
        self.adapters: dict[str, dict] = {}
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {"noise": torch.randn((1, 4, *SIZE), generator=generator)}
        for which, text in (("positive", POSITIVE), ("negative", NEGATIVE)):
            self.tensors |= {f"{which}.{key}": value for key, value in self.encode(text).items()}

    def encode(self, text: str) -> dict:
        raise NotImplementedError

    def checkpoint(self) -> dict:
        raise NotImplementedError

    def pipeline(self, sampler: Sampler):
        raise NotImplementedError

    def add_adapter(self, name: str, seed: int, wanted: str) -> None:
        """An adapter for the layers whose name contains `wanted`."""
        draw = Draw(seed)
        stems = [key.removesuffix(".weight") for key, value in sorted(self.weights.items()) if value.ndim > 1]
        adapter = {stem: lora(draw, self.weights[f"{stem}.weight"]) for stem in stems if wanted in stem}
        self.adapters[name] = adapter
        keys = {f"{kohya(stem)}.{piece}": value for stem, pieces in adapter.items() for piece, value in pieces.items()}
        write(self.folder, f"{self.name}.{name}", half(keys))

    def apply(self, stack: list) -> None:
        state = dict(self.weights)
        for name, strength in stack:
            for stem, pieces in self.adapters[name].items():
                state[f"{stem}.weight"] = changed(pieces, state[f"{stem}.weight"], strength)
        self.unet.load_state_dict({key: value.float() for key, value in state.items()})

    def run(
        self, name: str, sampler: str, stack=(), prediction="epsilon", zero_terminal_snr=False, image=False
    ) -> dict:
        self.apply(list(stack))
        pipeline = self.pipeline(Sampler(sampler, prediction, zero_terminal_snr))
        latent = pipeline(output_type="latent")
        assert latent.isfinite().all() and latent.std() < 200, f"{self.name} {name}: std {latent.std():.3f}"
        for case, other in self.tensors.items():
            if case.endswith(".latent"):
                effect = (latent - other).abs().max() / other.abs().max()
                assert effect > 0.02, f"{self.name} {name}: as {case} to {effect:.4f}"
        self.tensors[f"{name}.latent"] = latent
        if image:
            picture = pipeline(output_type="pt").movedim(1, -1)
            outside = ((picture <= 0) | (picture >= 1)).float().mean()
            assert outside < 0.5, f"{self.name} {name}: {outside:.2f} of the picture is clamped"
            self.tensors[f"{name}.image"] = picture
        self.apply([])
        facts = {"prediction": {"epsilon": "eps", "v_prediction": "v"}[prediction]}
        facts |= {"zero_terminal_snr": zero_terminal_snr, "sampler": sampler, "loras": list(stack)}
        return {"model": self.name, "case": name} | facts

    def finish(self) -> None:
        write(self.folder, f"{self.name}.io", self.tensors)
        write(self.folder, self.name, half(self.checkpoint()))


def called(pipeline, model: Model, sampler: Sampler, more: dict):
    pipeline.set_progress_bar_config(disable=True)
    height, width = (side * RATIO for side in SIZE)

    def call(output_type: str) -> torch.Tensor:
        return pipeline(
            prompt_embeds=model.tensors["positive.cond"],
            negative_prompt_embeds=model.tensors["negative.cond"],
            latents=model.tensors["noise"],
            guidance_scale=GUIDANCE,
            height=height,
            width=width,
            output_type=output_type,
            **sampler.arguments,
            **more,
        ).images

    return call


class Early(Model):
    """As SD1.5."""

    def __init__(self, folder: Path):
        unet = early(81, (True, True, False), (64, 64, 64), context=64)
        encoders = [encoder(82, 64, 2, 128, "quick_gelu", 64, VOCABULARY)]
        super().__init__("sd15", folder, 84, unet, autoencoder(83, 0.18215), encoders)

    def encode(self, text):
        return {"cond": self.encoders[0](input_ids=numbers(text, END)).last_hidden_state}

    def checkpoint(self):
        text = under("cond_stage_model.transformer.", without_projection(transformers_names(self.encoders[0])))
        unet = under("model.diffusion_model.", single_file(self.unet))
        return unet | text | under("first_stage_model.", to_ldm(self.vae.state_dict(), 4))

    def pipeline(self, sampler):
        parts = {"vae": self.vae, "text_encoder": self.encoders[0], "tokenizer": None, "unet": self.unet}
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return called(StableDiffusionPipeline(scheduler=sampler.scheduler, **parts), self, sampler, {})


class Late(Model):
    """As SDXL."""

    def __init__(self, folder: Path):
        unet = late(91, (0, 1), (64, 128), context=128, pooled=64, waves=256)
        encoders = [
            encoder(92, 64, 2, 128, "quick_gelu", 64, VOCABULARY),
            encoder(93, 64, 2, 128, "gelu", 64, VOCABULARY),
        ]
        super().__init__("sdxl", folder, 95, unet, autoencoder(94, 0.13025), encoders)

    def encode(self, text):
        first, second = (
            model(input_ids=numbers(text, pad), output_hidden_states=True)
            for model, pad in zip(self.encoders, (END, 0), strict=True)
        )
        cond = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2)
        return {"cond": cond, "pooled": second.text_embeds}

    def checkpoint(self):
        first, second = (transformers_names(model) for model in self.encoders)
        text = under("conditioner.embedders.0.transformer.", without_projection(first))
        text |= under("conditioner.embedders.1.model.", open_clip_names(second))
        unet = under("model.diffusion_model.", single_file(self.unet))
        return unet | text | under("first_stage_model.", to_ldm(self.vae.state_dict(), 4))

    def pipeline(self, sampler):
        parts = {"text_encoder": self.encoders[0], "text_encoder_2": self.encoders[1], "tokenizer": None}
        parts |= {"tokenizer_2": None, "vae": self.vae, "unet": self.unet, "add_watermarker": False}
        more = {
            "pooled_prompt_embeds": self.tensors["positive.pooled"],
            "negative_pooled_prompt_embeds": self.tensors["negative.pooled"],
        }
        return called(StableDiffusionXLPipeline(scheduler=sampler.scheduler, **parts), self, sampler, more)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]) / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # The models are so small that a second thread costs more than it does.
    torch.set_num_threads(1)

    model = Early(folder)
    model.add_adapter("attention", 85, ".attn")
    model.add_adapter("convolutions", 86, ".conv")
    stack = [("attention", 0.8), ("convolutions", -0.5)]
    cases = [
        model.run("euler", "euler", image=True),
        model.run("dpmpp_2m", "dpmpp_2m"),
        model.run("adapted", "dpmpp_2m", stack),
    ]
    model.finish()

    model = Late(folder)
    model.add_adapter("attention", 96, ".attn")
    velocity = {"prediction": "v_prediction", "zero_terminal_snr": True}
    cases += [
        model.run("euler", "euler"),
        model.run("dpmpp_2m", "dpmpp_2m", image=True),
        model.run("adapted", "euler", [("attention", 1.0)]),
        model.run("velocity-euler", "euler", **velocity),
        model.run("velocity-dpmpp_2m", "dpmpp_2m", **velocity),
    ]
    model.finish()
    shared = {"positive": POSITIVE, "negative": NEGATIVE, "steps": STEPS, "guidance": GUIDANCE, "cases": cases}
    (folder / "cases.json").write_text(json.dumps(shared, indent=1) + "\n")


if __name__ == "__main__":
    main()
