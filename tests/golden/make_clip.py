"""Writes small CLIP text encoders in every naming they are published in, with inputs and the reference's results.

    python tests/golden/make_clip.py FOLDER

needs torch, transformers, diffusers and safetensors. `MODEL.VARIANT.safetensors` holds weights, `MODEL.io.safetensors`
what goes in and what must come out. The vocabulary is small, but for `words`: its last token ends a prompt, the one
before starts one.
"""

import json
import math
import sys
from pathlib import Path

import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

VOCABULARY, LENGTH = 600, 77
START, END = VOCABULARY - 2, VOCABULARY - 1
# Of those who take words.
FULL_VOCABULARY = 49408


def redraw(model: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter anew: the usual start values would hide a layer that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embedding" in name:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
    # What float16 holds exactly has the same results in files of any type.
    return model.half().float().eval()


def encoder(
    seed: int, width: int, layers: int, ff: int, act: str, projection: int, vocabulary: int = VOCABULARY
) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=projection,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return redraw(CLIPTextModelWithProjection(config), seed)


# --- Names ---------------------------------------------------------------------------------------------------


def transformers_names(model: nn.Module) -> dict:
    """The weights with `text_model.` before all but the projection, whatever this version of transformers has."""
    state = {}
    for name, value in model.state_dict().items():
        is_inner = name.startswith(("text_model.", "text_projection."))
        state[name if is_inner else f"text_model.{name}"] = value
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def open_clip_names(state: dict) -> dict:
    """The same weights with query, key and value in one and the projection the other way round."""
    renamed = {}
    plain = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    for name, value in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif name in plain:
            renamed[plain[name]] = value
        else:
            number, rest = name.removeprefix("text_model.encoder.layers.").split(".", 1)
            layer, kind = rest.rsplit(".", 1)
            block = f"transformer.resblocks.{number}"
            if layer in parts:
                renamed[f"{block}.{parts[layer]}.{kind}"] = value
            elif layer == "self_attn.q_proj":
                stem = name.removesuffix(f"q_proj.{kind}")
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[f"{stem}{x}_proj.{kind}"] for x in "qkv"])
    return renamed


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def without_projection(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.startswith("text_projection")}


# --- References ----------------------------------------------------------------------------------------------


def prompt(seed: int, end: int, pad: int) -> torch.Tensor:
    """A prompt that ends at `end`, with the token `pad` behind."""
    words = torch.randint(0, START, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    words[0], words[end], words[end + 1 :] = START, END, pad
    return words


class Reference:
    def __init__(self, model: CLIPTextModelWithProjection, pad: int, usual: int, normalised: bool):
        self.model, self.pad, self.usual, self.normalised = model, pad, usual, normalised
        self.vocabulary = model.config.vocab_size

    def chunk(self, words: list[int]) -> torch.Tensor:
        """A prompt of these tokens."""
        ids = torch.full((LENGTH,), self.pad)
        ids[: len(words) + 2] = torch.tensor([self.vocabulary - 2, *words, self.vocabulary - 1])
        return ids

    def states(self, ids: torch.Tensor):
        return self.model(input_ids=ids, output_hidden_states=True)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = getattr(self.model, "text_model", self.model)
        return inner.final_layer_norm(hidden)

    def hidden(self, ids: torch.Tensor, from_end: int | None = None) -> torch.Tensor:
        found = self.states(ids)
        from_end = from_end or self.usual
        if from_end >= len(found.hidden_states):
            return found.last_hidden_state
        hidden = found.hidden_states[-from_end]
        return self.norm(hidden) if self.normalised else hidden

    def cond(self, ids: torch.Tensor, from_end: int | None = None) -> torch.Tensor:
        return torch.cat(list(self.hidden(ids, from_end)))[None]

    def weighted(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        empty = self.chunk([])
        *chunks, nothing = self.hidden(torch.cat([ids, empty[None]]))
        pairs = zip(chunks, weights, strict=True)
        return torch.cat([(chunk - nothing) * weight[:, None] + nothing for chunk, weight in pairs])[None]

    def pooled(self, ids: torch.Tensor) -> torch.Tensor:
        last = self.states(ids[:1]).last_hidden_state
        end = (ids[0] == self.vocabulary - 1).nonzero()[0, 0]
        return last[:, end]

    def projected(self, ids: torch.Tensor) -> torch.Tensor:
        return self.states(ids[:1]).text_embeds


def with_rows(reference: Reference, ids: torch.Tensor, places: list[int], rows: torch.Tensor) -> torch.Tensor:
    """The conditioning where `rows` stand at `places`: they are put behind the table of tokens for it."""
    table = reference.model.get_input_embeddings()
    before = table.weight.data
    table.weight.data = torch.cat([before, rows])
    ids = ids.clone()
    ids[0, places] = torch.arange(len(rows)) + reference.vocabulary
    cond = reference.cond(ids)
    table.weight.data = before
    return cond


def cases(reference: Reference, seed: int) -> dict:
    width = reference.model.config.hidden_size
    pad = reference.pad
    short, full = prompt(seed, 20, pad)[None], prompt(seed + 1, 76, pad)[None]
    long = torch.stack([prompt(seed + 2, 76, pad), prompt(seed + 3, 76, pad), prompt(seed + 4, 5, pad)])
    generator = torch.Generator().manual_seed(seed + 5)
    weights = torch.ones(3, LENGTH)
    weights[0, 3:9], weights[1, 1:70], weights[2, 2] = 1.3, 0.4, -0.7
    rows = torch.randn(3, width, generator=generator)
    places = torch.tensor([4, 5, 11])
    found = {
        "short": short,
        "short.cond": reference.cond(short),
        "short.pooled": reference.pooled(short),
        "short.projected": reference.projected(short),
        "full": full,
        "full.cond": reference.cond(full),
        "full.pooled": reference.pooled(full),
        "full.projected": reference.projected(full),
        "long": long,
        "long.cond": reference.cond(long),
        "long.pooled": reference.pooled(long),
        "long.projected": reference.projected(long),
        "weights": weights,
        "weighted.cond": reference.weighted(long, weights),
        "rows": rows,
        "places": places,
        "rows.cond": with_rows(reference, short, places.tolist(), rows),
    }
    for from_end in (1, 2, 3, 99):
        found[f"skip{from_end}.cond"] = reference.cond(short, from_end)
    assert found["short.cond"].std() > 0.1
    assert (found["weighted.cond"] - found["long.cond"]).abs().max() > 0.1
    return found


def waves(values: list[float]) -> torch.Tensor:
    return get_timestep_embedding(torch.tensor(values), 256, flip_sin_to_cos=True, downscale_freq_shift=0).flatten()


class Writer:
    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, tensors: dict) -> None:
        save_file(
            {key: value.detach().contiguous().clone() for key, value in tensors.items()},
            self.folder / f"{name}.safetensors",
        )

    def weights(self, name: str, state: dict, dtype: torch.dtype = torch.half) -> None:
        self.write(name, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()})


def write_all(writer: Writer) -> None:
    other = {"model.diffusion_model.time_embed.0.weight": torch.zeros(4, 4), "logit_scale": torch.zeros(())}

    # SD1: CLIP-L in its own file (with and without projection) and in a checkpoint, also without `text_model.`.
    small = encoder(1, 128, 3, 256, "quick_gelu", 96)
    state = transformers_names(small)
    writer.write("clip_l.io", cases(Reference(small, END, 1, True), 100))
    writer.weights("clip_l.transformers", state)
    writer.weights("clip_l.float", state, torch.float)
    checkpoint = under("cond_stage_model.transformer.", without_projection(state)) | other
    checkpoint["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    writer.weights("clip_l.checkpoint", checkpoint)
    bare = {name.removeprefix("text_model."): value for name, value in without_projection(state).items()}
    writer.weights("clip_l.bare", under("cond_stage_model.transformer.", bare))

    # SD2: CLIP-H. The small one stands where its checkpoint has it; the deep one is told by its depth.
    wide = encoder(2, 128, 4, 192, "gelu", 128)
    writer.write("clip_h.io", cases(Reference(wide, 0, 2, True), 200))
    writer.weights("clip_h.checkpoint", under("cond_stage_model.model.", open_clip_names(transformers_names(wide))))
    deep = encoder(3, 64, 24, 64, "gelu", 64)
    state = transformers_names(deep)
    writer.write("clip_h24.io", cases(Reference(deep, 0, 2, True), 300))
    writer.weights("clip_h24.transformers", state)
    last = "text_model.encoder.layers.23."
    writer.weights("clip_h24.one-less", {name: value for name, value in state.items() if not name.startswith(last)})

    # CLIP-G: its own file, and the refiner's checkpoint.
    deep = encoder(4, 64, 32, 64, "gelu", 96)
    state = transformers_names(deep)
    writer.write("clip_g.io", cases(Reference(deep, 0, 2, False), 400))
    writer.weights("clip_g.transformers", state)
    writer.weights("clip_g.refiner", under("conditioner.embedders.0.model.", open_clip_names(state)) | other)

    # SDXL: both in one checkpoint, or in a file each; a prompt that is longer for L than for G.
    first, second = Reference(small, END, 2, False), Reference(deep, 0, 2, False)
    joined = under("conditioner.embedders.0.transformer.", without_projection(transformers_names(small)))
    joined |= under("conditioner.embedders.1.model.", open_clip_names(state)) | other
    writer.weights("sdxl.checkpoint", joined)
    ids_l = torch.stack([prompt(500, 76, END), prompt(501, 9, END)])
    ids_g = prompt(502, 30, 0)[None]
    pooled = torch.randn(96, generator=torch.Generator().manual_seed(503))
    writer.write(
        "sdxl.io",
        {
            "l": ids_l,
            "g": ids_g,
            "cond": torch.cat([first.cond(ids_l)[:, :LENGTH], second.cond(ids_g)], dim=2),
            "pooled": second.projected(ids_g),
            "skip3.cond": torch.cat([first.cond(ids_l, 3)[:, :LENGTH], second.cond(ids_g, 3)], dim=2),
            "vector.pooled": pooled,
            "vector.base": torch.cat([pooled, waves([1024.0, 832.0, 16.0, 0.0, 1152.0, 896.0])]),
            "vector.refiner": torch.cat([pooled, waves([1024.0, 832.0, 16.0, 0.0, 2.5])]),
        },
    )


def write_words(writer: Writer) -> None:
    """CLIP-L and CLIP-G with all words, in a file each, and an embedding for both."""
    small = encoder(5, 64, 2, 64, "quick_gelu", 64, FULL_VOCABULARY)
    large = encoder(6, 64, 2, 64, "gelu", 64, FULL_VOCABULARY)
    writer.weights("words.l", without_projection(transformers_names(small)))
    writer.weights("words.g", under("conditioner.embedders.1.model.", open_clip_names(transformers_names(large))))
    first, second = Reference(small, FULL_VOCABULARY - 1, 2, False), Reference(large, 0, 2, False)
    both = (first, second)
    tokens = dict(json.loads(Path(__file__).with_name("clip_tokens.json").read_text()))
    cat, many = tokens["a photo of a cat"], tokens["word " * 120]
    generator = torch.Generator().manual_seed(504)
    rows = [torch.randn(2, 64, generator=generator).half().float() for _ in both]

    def joined(chunks: list[list[list[int]]], from_end: int | None = None) -> torch.Tensor:
        parts = zip(both, chunks, strict=True)
        return torch.cat([one.cond(torch.stack([one.chunk(c) for c in own]), from_end) for one, own in parts], dim=2)

    def weighted(reference: Reference) -> torch.Tensor:
        weights = torch.ones(1, LENGTH)
        weights[0, len(cat)] = 1.3
        return reference.weighted(reference.chunk(cat)[None], weights)

    long = [many[:75], many[75:]]
    named = [*cat[:3], 0, 0]
    places = [4, 5]
    writer.write(
        "words.io",
        {
            "cat.cond": joined([[cat], [cat]]),
            "cat.pooled": second.projected(second.chunk(cat)[None]),
            "cat.plain": second.pooled(second.chunk(cat)[None]),
            "last.cond": joined([[cat], [cat]], 1),
            "long.cond": joined([long, long]),
            "long.pooled": second.projected(second.chunk(long[0])[None]),
            "weighted.cond": torch.cat([weighted(one) for one in both], dim=2),
            "split.cond": joined([long, [cat, []]]),
            "embedding.cond": torch.cat(
                [with_rows(one, one.chunk(named)[None], places, own) for one, own in zip(both, rows, strict=True)],
                dim=2,
            ),
        },
    )
    (writer.folder / "embeddings").mkdir(exist_ok=True)
    writer.write("embeddings/style", {"clip_l": rows[0], "clip_g": rows[1]})


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # The models are so small that a second thread costs more than it does.
    torch.set_num_threads(1)
    write_all(Writer(folder))
    write_words(Writer(folder))


if __name__ == "__main__":
    main()
