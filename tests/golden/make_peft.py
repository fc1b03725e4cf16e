"""Writes adapters as peft and diffusers save them, with what models that peft itself has wrapped make of them.

    python tests/golden/make_peft.py FOLDER

needs peft beside what `make_unet.py` and `make_clip.py` need, and writes into FOLDER/peft. `MODEL.NAME` is a folder
with what peft saves (`adapter_model.safetensors` and `adapter_config.json`), what diffusers' pipelines save with the
settings in the header (`pytorch_lora_weights.safetensors`), and what its models save (`bare.safetensors`).
`MODEL.io.safetensors` has an input (`plain.x` and so on), what the model gives without adapters (`plain.out`, or
`plain.cond` and `plain.pooled`), and as peft runs it (`NAME.out` and so on). Alpha is never the rank, and no tensor in
these files tells it.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers
from make_clip import END, Reference, encoder, prompt
from make_unet import Case, early, late
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Linear layers, and convolutions with kernels of three and of one.
UNET = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

# Names, parts of names and an expression; whichever comes first of those that fit a layer counts. peft sorts them when
# it saves them: they are in that order here too, or it would load another adapter than it has saved.
PATTERNS = {
    "rank_pattern": {"down_blocks.0.resnets.0.conv1": 6, "to_k": 2},
    "alpha_pattern": {"attn2.to_k": 3, "down_blocks.0.resnets.0.conv1": 8.5, r"mid_b.*\.attn\d\.to_v": 2, "to_v": 9},
}
assert all(list(pattern) == sorted(pattern) for pattern in PATTERNS.values())
UNET_ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=10, target_modules=UNET),
    "patterns": lambda: LoraConfig(r=4, lora_alpha=10, target_modules=UNET, **PATTERNS),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=3, target_modules=UNET, use_rslora=True),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=UNET, use_dora=True),
    "loha": lambda: LoHaConfig(r=4, alpha=7, target_modules=UNET, alpha_pattern={"to_v": 2}),
    "loha-kernels": lambda: LoHaConfig(r=4, alpha=7, target_modules=UNET, use_effective_conv2d=True),
    # A rank of 64 is none: both factors are whole, and only the settings know what alpha is divided by.
    "lokr": lambda: LoKrConfig(r=4, alpha=6, target_modules=UNET, rank_pattern={"to_q": 64, "conv2": 64}),
    "lokr-kernels": lambda: LoKrConfig(
        r=2, alpha=3, target_modules=UNET, decompose_both=True, use_effective_conv2d=True
    ),
}
TEXT_ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=10, target_modules=TEXT, alpha_pattern={"layers.1.mlp.fc1": 3}),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=TEXT, use_dora=True),
    "loha": lambda: LoHaConfig(r=4, alpha=7, target_modules=TEXT),
}


def wrapped(model: nn.Module, config, seed: int):
    """The model with an adapter whose every number is drawn anew: as it starts, it changes nothing."""
    wrapper = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    own = [(name, one) for name, one in sorted(wrapper.named_parameters()) if ".default" in name]
    for name, parameter in own:
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.copy_(parameter * (1 + 0.1 * noise))
        else:
            # Of the two matrices of a product, and of four, the first makes it small.
            first = any(part in name for part in (".lora_B.", "w1_a", "w1."))
            parameter.copy_(noise * (0.05 if first else 0.6))
    return wrapper.eval()


def save_for_pipelines(folder: Path, states: dict, configs: dict) -> None:
    """As training scripts of diffusers do it."""
    layers, settings = {}, {}
    for part, state in states.items():
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
        settings[f"{part}_lora_adapter_metadata"] = plain(configs[part])
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **settings)
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        saved = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert all(f"{part}.lora_alpha" in saved for part in states), saved


def plain(config) -> dict:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def without_wrapper(state: dict) -> dict:
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}


def save(tensors: dict, path: Path) -> None:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)


def check(label: str, effect: torch.Tensor) -> None:
    assert 0.05 < effect.abs().max() < 50, f"{label}: effect {effect.abs().max():.3f}"


# --- UNets ---------------------------------------------------------------------------------------------------


def write_unet(folder: Path, name: str, make, case: list, adapters: list[str]) -> None:
    results = Case(make(), *case).finished("plain")
    for at, adapter in enumerate(adapters):
        model = make()
        run, config = Case(model, *case), UNET_ADAPTERS[adapter]()
        wrapper = wrapped(model, config, 1000 + at)
        out = run.answer()
        check(f"{name} {adapter}", out - results["plain.out"])
        results[f"{adapter}.out"] = out
        place = folder / f"{name}.{adapter}"
        wrapper.save_pretrained(place)
        if isinstance(config, LoraConfig):
            state = without_wrapper(get_peft_model_state_dict(wrapper))
            save_for_pipelines(place, {"unet": state}, {"unet": config})
            model.save_lora_adapter(place, adapter_name="default", weight_name="bare.safetensors")
    save(results, folder / f"{name}.io.safetensors")


# --- Text encoders -------------------------------------------------------------------------------------------


def write_text_encoder(folder: Path) -> None:
    ids = prompt(610, 20, END)[None]

    def answer(label: str, model: nn.Module) -> dict:
        reference = Reference(model, END, 1, True)
        return {f"{label}.cond": reference.cond(ids), f"{label}.pooled": reference.projected(ids)}

    def make() -> nn.Module:
        return encoder(1, 128, 3, 256, "quick_gelu", 96)

    results = {"ids.0.clip_l": ids} | answer("plain", make())
    for at, (adapter, config) in enumerate(TEXT_ADAPTERS.items()):
        model = make()
        wrapper = wrapped(model, config(), 1100 + at)
        results |= answer(adapter, model)
        check(adapter, results[f"{adapter}.cond"] - results["plain.cond"])
        place = folder / f"clip_l.{adapter}"
        wrapper.save_pretrained(place)
        if adapter == "lora":
            state = without_wrapper(get_peft_model_state_dict(wrapper))
            save_for_pipelines(place, {"text_encoder": state}, {"text_encoder": config()})
            write_without_projection(folder / "clip_l.lora-inner", make(), wrapper, config())
    save(results, folder / "clip_l.io.safetensors")


def write_without_projection(place: Path, model: nn.Module, other: nn.Module, config) -> None:
    """The same adapter of the model within, whose layers transformers calls otherwise."""
    inner = CLIPTextModel(model.config)
    wrapper = get_peft_model(inner, config)
    numbers = {key.replace("text_model.", ""): value for key, value in get_peft_model_state_dict(other).items()}
    for name, parameter in wrapper.named_parameters():
        key = name.replace(".default", "").replace("text_model.", "")
        if key in numbers:
            parameter.copy_(numbers.pop(key))
    assert not numbers, numbers.keys()
    wrapper.save_pretrained(place)


# --- Both in one file ----------------------------------------------------------------------------------------


def write_whole(folder: Path) -> None:
    """The parts of SDXL in one file, each with an alpha of its own."""
    models = {
        "unet": late(4, (0, 1), (64, 128)),
        "text_encoder": encoder(1, 128, 3, 256, "quick_gelu", 96),
        "text_encoder_2": encoder(4, 64, 32, 64, "gelu", 96),
    }
    configs = {
        "unet": LoraConfig(r=4, lora_alpha=10, target_modules=UNET, alpha_pattern={"to_v": 3}),
        "text_encoder": LoraConfig(r=2, lora_alpha=5, target_modules=TEXT, rank_pattern={"q_proj": 3}),
        "text_encoder_2": LoraConfig(r=3, lora_alpha=2, target_modules=TEXT, use_rslora=True),
    }
    case = Case(models["unet"], 92, 2, 6, 9, [500.0, 13.5])
    first, second = prompt(611, 76, END)[None], prompt(612, 30, 0)[None]
    references = [(Reference(models["text_encoder"], END, 2, False), first)]
    references.append((Reference(models["text_encoder_2"], 0, 2, False), second))

    def answer(label: str) -> dict:
        cond = torch.cat([reference.cond(ids) for reference, ids in references], 2)
        return {f"{label}.cond": cond, f"{label}.pooled": references[1][0].projected(second)}

    unet, text = case.finished("plain"), {"ids.0.clip_l": first, "ids.1.clip_g": second} | answer("plain")
    states = {}
    for at, (part, model) in enumerate(models.items()):
        wrapper = wrapped(model, configs[part], 1200 + at)
        states[part] = without_wrapper(get_peft_model_state_dict(wrapper))
    unet["lora.out"] = case.answer()
    text |= answer("lora")
    check("unet of all", unet["lora.out"] - unet["plain.out"])
    check("text encoders of all", text["lora.cond"] - text["plain.cond"])
    save_for_pipelines(folder / "sdxl.lora", states, configs)
    save(unet, folder / "sdxl.io.safetensors")
    save(text, folder / "sdxl-text.io.safetensors")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]) / "peft"
    folder.mkdir(parents=True, exist_ok=True)
    # About what is of no interest to models that are not trained.
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)

    def small() -> nn.Module:
        return early(1, (True, True, False), (64, 64, 64))

    write_unet(folder, "sd15", small, [91, 2, 8, 6, [500.0, 13.5]], list(UNET_ADAPTERS))
    write_text_encoder(folder)
    write_whole(folder)


if __name__ == "__main__":
    main()
