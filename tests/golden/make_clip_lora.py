"""Writes small adapter files for text encoders of `make_clip.py`, with the results of the reference with them merged.

    python tests/golden/make_clip_lora.py FOLDER

needs what `make_clip.py` needs, and writes into FOLDER/lora. Names of files and results are those of `make_lora.py`,
whose formulas these are: weights are computed in float64, and the model then runs in float32.
"""

import sys
from pathlib import Path

import torch
from make_clip import END, Reference, encoder, prompt
from make_lora import KINDS, RANK, Draw, changed, full, lora
from safetensors.torch import save_file

PEFT = (".lora_B.weight", ".lora_A.weight")


class Set:
    """Text encoders that are used together, each with its tokens."""

    def __init__(self, name: str, encoders: list[tuple[Reference, torch.Tensor, str]], folder: Path):
        self.name, self.encoders, self.folder = name, encoders, folder
        self.adapters, self.results = {}, {}
        self.weights = [
            {key: value.double() for key, value in reference.model.state_dict().items()} for reference, _, _ in encoders
        ]
        # (encoder, transformers' name) of every linear layer.
        self.layers = [
            (at, self.full(key))
            for at, weights in enumerate(self.weights)
            for key in sorted(weights)
            if key.endswith(".weight") and weights[key].ndim == 2 and "embedding" not in key
        ]
        for at, (_, ids, kind) in enumerate(encoders):
            self.results[f"ids.{at}.{kind}"] = ids
        self.results |= self.answer("plain")

    @staticmethod
    def full(key: str) -> str:
        """With the prefix that this version of transformers may leave out."""
        stem = key.removesuffix(".weight")
        return stem if stem.startswith(("text_model.", "text_projection")) else f"text_model.{stem}"

    def key(self, layer: tuple[int, str], end: str) -> str:
        at, stem = layer
        key = f"{stem}.{end}"
        return key if key in self.weights[at] else key.removeprefix("text_model.")

    def weight(self, layer: tuple[int, str]) -> torch.Tensor:
        return self.weights[layer[0]][self.key(layer, "weight")]

    def answer(self, label: str) -> dict:
        conds = [reference.cond(ids) for reference, ids, _ in self.encoders]
        length = min(cond.shape[1] for cond in conds)
        last, ids, _ = self.encoders[-1]
        return {
            f"{label}.cond": torch.cat([cond[:, :length] for cond in conds], dim=2),
            f"{label}.pooled": last.projected(ids),
        }

    def load(self, states: list[dict]) -> None:
        for (reference, _, _), state in zip(self.encoders, states, strict=True):
            reference.model.load_state_dict({key: value.float() for key, value in state.items()})

    def expect(self, *stack: tuple[str, float]) -> None:
        states = [dict(weights) for weights in self.weights]
        for name, strength in stack:
            for layer, pieces in self.adapters[name].items():
                state, weight = states[layer[0]], self.key(layer, "weight")
                if set(pieces) - {"diff_b"}:
                    state[weight] = changed(pieces, state[weight], strength)
                if "diff_b" in pieces:
                    bias = self.key(layer, "bias")
                    state[bias] = state[bias] + strength * pieces["diff_b"]
        self.load(states)
        label = "+".join(f"{name}@{strength:g}" for name, strength in stack)
        answer = self.answer(label)
        self.load(self.weights)
        effect = (answer[f"{label}.cond"] - self.results["plain.cond"]).abs().max()
        assert 0.05 < effect < 100, f"{self.name} {label}: effect {effect:.3f}"
        self.results |= answer

    def write(self, name: str, tensors: dict) -> None:
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, self.folder / f"{self.name}.{name}.safetensors")

    def add(self, name: str, adapter: dict, dtype: torch.dtype) -> None:
        """Keeps an adapter {layer: pieces} and writes it as kohya's trainer names it."""
        self.adapters[name] = adapter
        tensors = {}
        for layer, pieces in adapter.items():
            tensors |= {f"{self.kohya(layer)}.{end}": value.to(dtype) for end, value in pieces.items()}
        self.write(name, tensors)

    def kohya(self, layer: tuple[int, str]) -> str:
        at, stem = layer
        start = "lora_te" if len(self.encoders) == 1 else f"lora_te{at + 1}"
        return f"{start}_{stem.replace('.', '_')}"

    def finish(self) -> None:
        self.write("io", self.results)


def some(layers: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Of every sort at least one; of what is fused in some files not all three."""
    return [layer for at, layer in enumerate(layers) if at % 5 in (0, 2) or layer[1] == "text_projection"]


def layouts(model: Set, seed: int) -> None:
    """One adapter in all the ways in which its keys are written."""
    draw = Draw(seed)
    adapter = {layer: lora(draw, model.weight(layer)) for layer in some(model.layers)}
    model.adapters["layout"] = adapter
    model.expect(("layout", 1.0))
    kinds = [kind for _, _, kind in model.encoders]

    def dotted(layer: tuple[int, str]) -> str:
        at, stem = layer
        return f"text_encoder{'' if at == 0 else f'_{at + 1}'}.{stem}"

    def underscored(start: str):
        return lambda layer: f"{start}_{layer[1].replace('.', '_')}"

    def processor(layer: tuple[int, str]) -> str:
        name = dotted(layer)
        for own, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            name = f"{name.removesuffix(own)}{old}" if name.endswith(f".{own}") else name
        return name

    def write(name: str, of, up: str = ".lora_up.weight", down: str = ".lora_down.weight") -> None:
        keys = {}
        for layer, pieces in adapter.items():
            keys[of(layer) + up] = pieces["lora_up.weight"].float()
            keys[of(layer) + down] = pieces["lora_down.weight"].float()
        model.write(f"layout-{name}", keys)

    write("kohya", model.kohya)
    write("generic", lambda layer: f"text_encoders.{kinds[layer[0]]}.transformer.{layer[1]}")
    write("generic-peft", lambda layer: f"text_encoders.{kinds[layer[0]]}.transformer.{layer[1]}", *PEFT)
    write("diffusers", dotted, ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
    write("diffusers-peft", dotted, *PEFT)
    write("diffusers-bare", dotted, ".lora.up.weight", ".lora.down.weight")
    write("processor", processor, "_lora.up.weight", "_lora.down.weight")
    if len(kinds) == 1:
        write("kohya-first", underscored("lora_te1"))
        write("lycoris", underscored("lycoris_te"))
        write("peft", lambda layer: f"base_model.model.{layer[1]}", *PEFT)
        default = (".lora_B.default.weight", ".lora_A.default.weight")
        write("peft-default", lambda layer: f"base_model.model.{layer[1]}", *default)
    doubled = {}
    for layer, pieces in adapter.items():
        doubled[f"{model.kohya(layer)}.lora_up.weight"] = 2 * pieces["lora_up.weight"].float()
        doubled[f"{model.kohya(layer)}.lora_down.weight"] = pieces["lora_down.weight"].float()
        doubled[f"{model.kohya(layer)}.alpha"] = torch.tensor(RANK / 2)
    model.write("layout-alpha", doubled)


def fill(model: Set, seed: int, kinds: list[str], stacks: list[tuple]) -> None:
    draw = Draw(seed)
    difference = {}
    for layer in some(model.layers):
        difference[layer] = full(draw, model.weight(layer))
        if layer[1] != "text_projection":
            bias = model.weights[layer[0]][model.key(layer, "bias")]
            difference[layer]["diff_b"] = (0.2 * draw(*bias.shape)).half().double()
    model.add("difference", difference, torch.float32)
    for at, kind in enumerate(kinds):
        draw = Draw(seed + 1 + at)
        layers = model.layers if kind == "lora" else some(model.layers)
        adapter = {layer: KINDS[kind](draw, model.weight(layer)) for layer in layers}
        model.add(kind, adapter, torch.float16 if at % 2 else torch.float32)
    for kind in ["difference", *kinds]:
        model.expect((kind, 1.0))
        if kind != "set":
            model.expect((kind, -0.5))
    for stack in stacks:
        model.expect(*stack)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]) / "lora"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    small, deep = encoder(1, 128, 3, 256, "quick_gelu", 96), encoder(4, 64, 32, 64, "gelu", 96)

    # CLIP-L of SD1 in a file of its own, its projection with it.
    model = Set("clip_l", [(Reference(small, END, 1, True), prompt(600, 20, END)[None], "clip_l")], folder)
    kinds = [kind for kind in KINDS if "tucker" not in kind and kind != "locon"]
    ordered = [("lora", "dora-rows"), ("glora", "oft"), ("difference", "boft"), ("lora", "loha"), ("lora", "lora")]
    stacks = [((a, 0.8), (b, 1.0)) for a, b in ordered] + [((b, 1.0), (a, 0.8)) for a, b in ordered]
    fill(model, 700, kinds, [*stacks, (("lora", 0.7), ("set", 1.0), ("lokr", 0.5), ("loha", -0.4))])
    layouts(model, 800)
    model.finish()

    # Both encoders of SDXL; of G the checkpoint has query, key and value in one. L has no projection there.
    first = (Reference(small, END, 2, False), torch.stack([prompt(601, 76, END)]), "clip_l")
    second = (Reference(deep, 0, 2, False), prompt(602, 30, 0)[None], "clip_g")
    model = Set("sdxl", [first, second], folder)
    model.layers = [layer for layer in model.layers if layer != (0, "text_projection")]
    stacks = [(("lora", 1.0), ("dora-rows", 0.5)), (("lokr", 0.6), ("lora", -0.3))]
    fill(model, 900, ["lora", "loha", "lokr", "glora", "boft", "dora-rows"], stacks)
    layouts(model, 1000)
    model.finish()


if __name__ == "__main__":
    main()
