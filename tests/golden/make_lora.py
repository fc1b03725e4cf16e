"""Writes small adapter files for the UNets of `make_unet.py`, with the results of the reference with them merged.

    python tests/golden/make_lora.py FOLDER

needs what `make_unet.py` needs, and writes into FOLDER/lora. `MODEL.NAME.safetensors` is an adapter,
`MODEL.io.safetensors` has one input (`plain.x` and so on), what the model gives without adapters (`plain.out`), and the
result with adapters: `NAME@STRENGTH.out`, with `+` between those of a stack, in the order in which they are applied.
Changed weights are computed here in float64, by formulas of their own; the model then runs in float32.
"""

import math
import sys
from pathlib import Path

import torch
from make_unet import Case, early, late, single_file_name
from safetensors.torch import save_file

RANK = 4
# How large a change is, beside the weight.
SHARE = 0.35


class Draw:
    """Numbers that half precision holds, so that files may store them in either type."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).half().double()

    def sized(self, tensor: torch.Tensor, change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`tensor`, so that `change`, which is linear in it, has its share of `weight`."""
        return (tensor * (SHARE * weight.std() / change.std())).half().double()


# --- Kinds: what a file has for a layer, and what it makes of a weight ---------------------------------------------


def product(pieces: dict, weight: torch.Tensor) -> torch.Tensor:
    up, down, mid = (pieces.get(f"lora_{part}.weight") for part in ("up", "down", "mid"))
    if mid is None:
        return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return torch.einsum("or,rqxy,qi->oixy", up.flatten(1), mid, down.flatten(1))


def lora(draw: Draw, weight: torch.Tensor) -> dict:
    out, inner = weight.shape[0], weight.shape[1:]
    ones = [1] * (weight.ndim - 2)
    pieces = {"lora_up.weight": draw(out, RANK, *ones), "lora_down.weight": draw(RANK, *inner)}
    pieces["lora_up.weight"] = draw.sized(pieces["lora_up.weight"], product(pieces, weight), weight)
    return pieces


def locon(draw: Draw, weight: torch.Tensor) -> dict:
    if weight.ndim < 4:
        return lora(draw, weight)
    out, inner, *kernel = weight.shape
    pieces = {
        "lora_up.weight": draw(out, RANK, 1, 1),
        "lora_mid.weight": draw(RANK, RANK, *kernel),
        "lora_down.weight": draw(RANK, inner, 1, 1),
    }
    pieces["lora_up.weight"] = draw.sized(pieces["lora_up.weight"], product(pieces, weight), weight)
    return pieces | {"alpha": torch.tensor(2.0)}


def loha(draw: Draw, weight: torch.Tensor) -> dict:
    out, inner = weight.shape[0], weight[0].numel()
    pieces = {
        f"hada_w{n}_{part}": draw(*shape) for n in (1, 2) for part, shape in (("a", (out, RANK)), ("b", (RANK, inner)))
    }
    pieces["hada_w1_a"] = draw.sized(pieces["hada_w1_a"], hadamard(pieces, weight), weight)
    return pieces | {"alpha": torch.tensor(5.0)}


def loha_tucker(draw: Draw, weight: torch.Tensor) -> dict:
    if weight.ndim < 4:
        return loha(draw, weight)
    out, inner, *kernel = weight.shape
    pieces = {}
    for n in (1, 2):
        pieces[f"hada_t{n}"] = draw(RANK, RANK, *kernel)
        pieces[f"hada_w{n}_a"], pieces[f"hada_w{n}_b"] = draw(RANK, out), draw(RANK, inner)
    pieces["hada_w2_a"] = draw.sized(pieces["hada_w2_a"], hadamard(pieces, weight), weight)
    return pieces


def hadamard(pieces: dict, weight: torch.Tensor) -> torch.Tensor:
    parts = []
    for n in (1, 2):
        a, b, core = pieces[f"hada_w{n}_a"], pieces[f"hada_w{n}_b"], pieces.get(f"hada_t{n}")
        if core is None:
            parts.append((a @ b).reshape(weight.shape))
        else:
            parts.append(torch.einsum("rqxy,ro,qi->oixy", core, a, b))
    return parts[0] * parts[1]


def kron_parts(pieces: dict) -> tuple[torch.Tensor, torch.Tensor]:
    def part(name: str) -> torch.Tensor:
        if name in pieces:
            return pieces[name]
        if "lokr_t2" in pieces and name == "lokr_w2":
            return torch.einsum("rqxy,ro,qi->oixy", pieces["lokr_t2"], pieces["lokr_w2_a"], pieces["lokr_w2_b"])
        return pieces[f"{name}_a"] @ pieces[f"{name}_b"]

    return part("lokr_w1"), part("lokr_w2")


def kron(pieces: dict, weight: torch.Tensor) -> torch.Tensor:
    first, second = kron_parts(pieces)
    if second.ndim < 4 and weight.ndim == 4:
        second = second.reshape(second.shape[0], -1, *weight.shape[2:])
    change = torch.einsum("ac,bd...->abcd...", first, second)
    return change.reshape(weight.shape)


def halves(count: int) -> tuple[int, int]:
    small = max(n for n in (1, 2, 4, 8) if count % n == 0)
    return small, count // small


def lokr(draw: Draw, weight: torch.Tensor) -> dict:
    (a, b), (c, d) = halves(weight.shape[0]), halves(weight.shape[1])
    pieces = {"lokr_w1": draw(a, c), "lokr_w2": draw(b, d, *weight.shape[2:]), "alpha": torch.tensor(3.0)}
    pieces["lokr_w2"] = draw.sized(pieces["lokr_w2"], kron(pieces, weight), weight)
    return pieces


def lokr_factored(draw: Draw, weight: torch.Tensor) -> dict:
    (a, b), (c, d) = halves(weight.shape[0]), halves(weight.shape[1])
    pieces = {"lokr_w1_a": draw(a, 3), "lokr_w1_b": draw(3, c), "alpha": torch.tensor(3.0)}
    pieces |= {"lokr_w2_a": draw(b, RANK), "lokr_w2_b": draw(RANK, d * math.prod(weight.shape[2:]))}
    pieces["lokr_w2_a"] = draw.sized(pieces["lokr_w2_a"], kron(pieces, weight), weight)
    return pieces


def lokr_tucker(draw: Draw, weight: torch.Tensor) -> dict:
    (a, b), (c, d) = halves(weight.shape[0]), halves(weight.shape[1])
    pieces = {"lokr_w1_a": draw(a, 3), "lokr_w1_b": draw(3, c), "alpha": torch.tensor(3.0)}
    if weight.ndim < 4:
        pieces["lokr_w2"] = draw(b, d)
        pieces["lokr_w2"] = draw.sized(pieces["lokr_w2"], kron(pieces, weight), weight)
        return pieces
    pieces |= {"lokr_w2_a": draw(RANK, b), "lokr_w2_b": draw(RANK, d), "lokr_t2": draw(RANK, RANK, *weight.shape[2:])}
    pieces["lokr_w2_a"] = draw.sized(pieces["lokr_w2_a"], kron(pieces, weight), weight)
    return pieces


def glora(draw: Draw, weight: torch.Tensor) -> dict:
    out, inner = weight.shape[:2]
    small = SHARE / math.sqrt(RANK * inner)
    pieces = {"a1.weight": draw(inner, RANK) * small, "a2.weight": draw(RANK, inner)}
    pieces |= {"b1.weight": draw(out, RANK), "b2.weight": draw(RANK, *weight.shape[1:])}
    change = (pieces["b1.weight"] @ pieces["b2.weight"].flatten(1)).reshape(weight.shape)
    pieces["b1.weight"] = draw.sized(pieces["b1.weight"], change, weight)
    return {name: value.half().double() for name, value in pieces.items()} | {"alpha": torch.tensor(3.0)}


def glora_old(draw: Draw, weight: torch.Tensor) -> dict:
    out, inner = weight.shape[0], weight[0].numel()
    small = SHARE / math.sqrt(RANK * inner)
    pieces = {"a1.weight": draw(RANK, inner) * small, "a2.weight": draw(inner, RANK)}
    pieces |= {"b1.weight": draw(RANK, inner), "b2.weight": draw(out, RANK)}
    change = (pieces["b2.weight"] @ pieces["b1.weight"]).reshape(weight.shape)
    pieces["b2.weight"] = draw.sized(pieces["b2.weight"], change, weight)
    return {name: value.half().double() for name, value in pieces.items()}


def block_side(count: int) -> int:
    return max(n for n in (1, 2, 4, 8) if count % n == 0)


def oft(draw: Draw, weight: torch.Tensor) -> dict:
    side = block_side(weight.shape[0])
    blocks = (0.3 * draw(weight.shape[0] // side, side, side)).half().double()
    return {"oft_blocks": blocks, "alpha": torch.tensor(2.0)}


def oft_rescaled(draw: Draw, weight: torch.Tensor) -> dict:
    scale = (1 + 0.2 * draw(weight.shape[0], *[1] * (weight.ndim - 1))).half().double()
    pieces = oft(draw, weight)
    return {"oft_blocks": pieces["oft_blocks"], "rescale": scale}


def boft(draw: Draw, weight: torch.Tensor) -> dict:
    side = block_side(weight.shape[0])
    rounds = 1 + int(math.log2(weight.shape[0] & -weight.shape[0])) - int(math.log2(side))
    blocks = (0.2 * draw(min(rounds, 3), weight.shape[0] // side, side, side)).half().double()
    return {"oft_blocks": blocks, "alpha": torch.tensor(3.0)}


def boft_rescaled(draw: Draw, weight: torch.Tensor) -> dict:
    scale = (1 + 0.2 * draw(weight.shape[0], *[1] * (weight.ndim - 1))).half().double()
    return boft(draw, weight) | {"rescale": scale}


def dora(of_rows: bool, inner):
    def pieces_of(draw: Draw, weight: torch.Tensor) -> dict:
        shape = [1] * weight.ndim
        shape[0 if of_rows else 1] = -1
        along = [at for at in range(weight.ndim) if at != (0 if of_rows else 1)]
        lengths = weight.square().sum(along).sqrt().reshape(shape)
        lengths = (lengths * (1 + 0.1 * draw(*lengths.shape))).half().double()
        return inner(draw, weight) | {"dora_scale": lengths}

    return pieces_of


def full(draw: Draw, weight: torch.Tensor) -> dict:
    return {"diff": (SHARE * weight.std() * draw(*weight.shape)).half().double()}


def other(draw: Draw, weight: torch.Tensor) -> dict:
    return {"set_weight": (weight.std() * draw(*weight.shape)).half().double()}


KINDS = {
    "lora": lora,
    "locon": locon,
    "loha": loha,
    "loha-tucker": loha_tucker,
    "lokr": lokr,
    "lokr-factored": lokr_factored,
    "lokr-tucker": lokr_tucker,
    "glora": glora,
    "glora-old": glora_old,
    "oft": oft,
    "oft-rescaled": oft_rescaled,
    "boft": boft,
    "boft-rescaled": boft_rescaled,
    "dora-rows": dora(True, lora),
    "dora-columns": dora(False, locon),
    "dora-loha": dora(False, loha),
    "dora-lokr": dora(True, lokr_factored),
    "dora-glora": dora(False, glora),
    "set": other,
}


# --- What a weight becomes -----------------------------------------------------------------------------------


def turn(pieces: dict, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """ComfyUI's: the strength counts within the turn and again outside it."""
    blocks = pieces["oft_blocks"]
    skew = blocks - blocks.mT
    limit = float(pieces.get("alpha", 0.0))
    norm = float(skew.square().sum().sqrt())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    side = blocks.shape[-1]
    one = torch.eye(side, dtype=torch.float64)
    cayley = torch.linalg.solve(one - skew, one + skew, left=False)
    cayley = strength * cayley + (1 - strength) * one
    rows = weight.flatten(1)
    if blocks.ndim == 3:
        rows = torch.block_diag(*cayley).T @ rows
    else:
        for number, matrices in enumerate(cayley):
            rows = (
                butterfly(number, side, len(rows)).T
                @ torch.block_diag(*matrices)
                @ butterfly(number, side, len(rows))
                @ rows
            )
    turned = rows.reshape(weight.shape)
    if "rescale" in pieces:
        turned = turned * pieces["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
    return weight + strength * (turned - weight)


def butterfly(number: int, side: int, count: int) -> torch.Tensor:
    """The permutation that brings channels to their blocks in a round: row i has channel `order[i]`."""
    far = side // 2 * 2**number
    order = []
    for start in range(0, count, 2 * far):
        for at in range(far):
            order += [start + at, start + far + at]
    return torch.eye(count, dtype=torch.float64)[order]


def scale(pieces: dict) -> float:
    if "alpha" not in pieces:
        return 1.0
    if "a1.weight" in pieces:
        return float(pieces["alpha"]) / RANK
    for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in pieces:
            return float(pieces["alpha"]) / pieces[name].shape[0]
    return 1.0


def changed(pieces: dict, weight: torch.Tensor, strength: float) -> torch.Tensor:
    if "set_weight" in pieces:
        return pieces["set_weight"]
    if "oft_blocks" in pieces:
        return turn(pieces, weight, strength)
    if "diff" in pieces or "w_norm" in pieces:
        return weight + strength * pieces.get("diff", pieces.get("w_norm"))
    if "lora_up.weight" in pieces:
        change = product(pieces, weight)
    elif "hada_w1_a" in pieces:
        change = hadamard(pieces, weight)
    elif "a1.weight" in pieces:
        a1, a2, b1, b2 = (pieces[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        if len(b2) == len(weight) and b2.shape[1] == RANK:
            change = (weight.flatten(1) @ a2 @ a1 + b2 @ b1).reshape(weight.shape)
        else:
            change = torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(weight.shape)
    else:
        change = kron(pieces, weight)
    change = change * scale(pieces)
    if "dora_scale" not in pieces:
        return weight + strength * change
    lengths, whole = pieces["dora_scale"], weight + change
    of_rows = lengths.shape[0] == weight.shape[0]
    measured, keep = (weight, 0) if of_rows else (whole, 1)
    norms = measured.square().sum([at for at in range(weight.ndim) if at != keep], keepdim=True).sqrt()
    return weight + strength * (whole * lengths / norms - weight)


# --- Files ---------------------------------------------------------------------------------------------------


class Model:
    def __init__(self, name: str, unet, case: Case, folder: Path):
        self.name, self.unet, self.case, self.folder = name, unet, case, folder
        self.weights = {key: value.double() for key, value in unet.state_dict().items()}
        self.stems = sorted(key.removesuffix(".weight") for key in self.weights if key.endswith(".weight"))
        self.layers = [stem for stem in self.stems if self.weights[f"{stem}.weight"].ndim > 1]
        self.adapters = {}
        self.results = case.finished("plain")

    def single(self, stem: str) -> str:
        return single_file_name(self.unet, f"{stem}.weight").removesuffix(".weight")

    def add(self, name: str, adapter: dict, dtype=torch.float32) -> None:
        """Keeps an adapter {diffusers stem: pieces} and writes it as kohya's trainer names it."""
        self.adapters[name] = adapter
        self.write(name, {kohya(stem): pieces for stem, pieces in adapter.items()}, dtype)

    def write(self, name: str, adapter: dict, dtype=torch.float32) -> None:
        tensors = {f"{stem}.{piece}": value for stem, pieces in adapter.items() for piece, value in pieces.items()}
        self.write_keys(name, {key: value.to(dtype) for key, value in tensors.items()})

    def write_keys(self, name: str, tensors: dict) -> None:
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, self.folder / f"{self.name}.{name}.safetensors")

    def expect(self, *stack: tuple[str, float]) -> None:
        state = dict(self.weights)
        for name, strength in stack:
            for stem, pieces in self.adapters[name].items():
                weight = f"{stem}.weight"
                if set(pieces) - {"diff_b", "b_norm"}:
                    state[weight] = changed(pieces, state[weight], strength)
                for bias in {"diff_b", "b_norm"} & set(pieces):
                    state[f"{stem}.bias"] = state[f"{stem}.bias"] + strength * pieces[bias]
        self.unet.load_state_dict({key: value.float() for key, value in state.items()})
        out = self.case.answer()
        self.unet.load_state_dict({key: value.float() for key, value in self.weights.items()})
        label = "+".join(f"{name}@{strength:g}" for name, strength in stack)
        effect = (out - self.results["plain.out"]).abs().max()
        assert 0.05 < effect < 50 and out.std() < 10, f"{self.name} {label}: effect {effect:.3f}, std {out.std():.2f}"
        self.results[f"{label}.out"] = out

    def finish(self) -> None:
        tensors = {key: value.contiguous().clone() for key, value in self.results.items()}
        save_file(tensors, self.folder / f"{self.name}.io.safetensors")


def kohya(stem: str) -> str:
    return f"lora_unet_{stem.replace('.', '_')}"


def layouts(model: Model, seed: int) -> None:
    """One adapter in all the ways in which its keys are written; with alpha where trainers always have one."""
    up, down = "lora_up.weight", "lora_down.weight"
    draw = Draw(seed)
    adapter = {stem: lora(draw, model.weights[f"{stem}.weight"]) for stem in some(model.layers)}
    model.adapters["layout"] = adapter
    model.expect(("layout", 1.0))

    def named(of, up_name=f".{up}", down_name=f".{down}"):
        keys = {}
        for stem, pieces in adapter.items():
            keys[of(stem) + up_name] = pieces[up].float()
            keys[of(stem) + down_name] = pieces[down].float()
        return keys

    def with_alpha(keys: dict) -> dict:
        doubled = {key: 2 * value if key.endswith(up) else value for key, value in keys.items()}
        stems = [key.removesuffix(f".{up}") for key in keys if key.endswith(up)]
        return doubled | {f"{stem}.alpha": torch.tensor(RANK / 2) for stem in stems}

    def processor(stem: str) -> str:
        stem = stem.replace(".to_", ".processor.to_")
        return stem.removesuffix(".0") if stem.endswith(".to_out.0") else stem

    peft = (".lora_B.weight", ".lora_A.weight")
    write = model.write_keys
    write("layout-kohya", with_alpha(named(kohya)))
    write("layout-kohya-single", with_alpha(named(lambda stem: f"lora_unet_{model.single(stem).replace('.', '_')}")))
    write("layout-lycoris", with_alpha(named(lambda stem: f"lycoris_{stem.replace('.', '_')}")))
    write("layout-single", named(lambda stem: f"diffusion_model.{model.single(stem)}", *peft))
    write("layout-single-bare", named(lambda stem: f"diffusion_model.{model.single(stem)}", ".lora_B", ".lora_A"))
    write("layout-diffusers", named(lambda stem: stem, ".lora.up.weight", ".lora.down.weight"))
    write("layout-diffusers-unet", named(lambda stem: f"unet.{stem}", ".lora.up.weight", ".lora.down.weight"))
    write("layout-processor", named(lambda stem: processor(f"unet.{stem}"), "_lora.up.weight", "_lora.down.weight"))
    write("layout-processor-bare", named(processor, "_lora.up.weight", "_lora.down.weight"))
    write("layout-peft-unet", named(lambda stem: f"unet.{stem}", *peft))
    write("layout-peft", named(lambda stem: f"base_model.model.{stem}", *peft))
    default = (".lora_B.default.weight", ".lora_A.default.weight")
    write("layout-peft-default", named(lambda stem: f"base_model.model.{stem}", *default))
    linear = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
    write("layout-linear-layer", named(lambda stem: f"unet.{stem}", *linear))


def some(layers: list[str]) -> list[str]:
    """Of every sort of layer at least one, in every second block."""
    wanted = ("conv_in", "downsamplers", "upsamplers", "linear_1", "conv_out")
    return [stem for at, stem in enumerate(layers) if at % 3 == 0 or any(part in stem for part in wanted)]


def norms_and_biases(model: Model, draw: Draw) -> dict:
    adapter = {}
    for stem in model.stems:
        weight, bias = model.weights[f"{stem}.weight"], model.weights.get(f"{stem}.bias")
        if weight.ndim == 1:
            adapter[stem] = {"w_norm": (0.3 * draw(*weight.shape)).half().double()}
            adapter[stem]["b_norm"] = (0.2 * draw(*bias.shape)).half().double()
        elif stem in some(model.layers):
            adapter[stem] = full(draw, weight)
            if bias is not None:
                adapter[stem]["diff_b"] = (0.2 * draw(*bias.shape)).half().double()
        elif bias is not None:
            adapter[stem] = {"diff_b": (0.2 * draw(*bias.shape)).half().double()}
    return adapter


def fill(model: Model, seed: int, kinds: list[str], stacks: list[tuple]) -> None:
    for at, kind in enumerate(kinds):
        draw = Draw(seed + at)
        layers = model.layers if kind == "lora" else some(model.layers)
        if "glora" in kind:
            # Four channels are as many as the rank, and the two ways of writing could not be told apart.
            layers = [stem for stem in layers if len(model.weights[f"{stem}.weight"]) != RANK]
        adapter = {stem: KINDS[kind](draw, model.weights[f"{stem}.weight"]) for stem in layers}
        model.add(kind, adapter, torch.float16 if at % 2 else torch.float32)
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

    unet = early(1, (True, True, False), (64, 64, 64))
    model = Model("sd15", unet, Case(unet, 71, 2, 8, 6, [500.0, 13.5]), folder)
    model.add("difference", norms_and_biases(model, Draw(100)))
    model.expect(("difference", 1.0))
    model.expect(("difference", -0.5))
    stacks = [((a, 0.8), (b, 1.0)) for a, b in ORDERED] + [((b, 1.0), (a, 0.8)) for a, b in ORDERED]
    fill(model, 200, list(KINDS), [*stacks, (("lora", 0.7), ("set", 1.0), ("locon", 0.5), ("loha", -0.4))])
    layouts(model, 300)
    model.finish()

    unet = late(4, (0, 1), (64, 128))
    model = Model("sdxl", unet, Case(unet, 72, 2, 6, 9, [500.0, 13.5]), folder)
    fill(
        model, 400, ["lora", "locon", "loha", "lokr-tucker", "oft", "dora-rows"], [(("lora", 1.0), ("dora-rows", 0.5))]
    )
    layouts(model, 500)
    model.finish()


# Pairs whose order matters, and some for which it does not.
ORDERED = [
    ("lora", "dora-rows"),
    ("dora-columns", "lora"),
    ("glora", "oft"),
    ("lora", "loha"),
    ("locon", "set"),
    ("difference", "boft"),
    ("lora", "lora"),
]


if __name__ == "__main__":
    main()
