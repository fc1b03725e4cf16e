"""Writes small UNet files as single-file checkpoints name them, with inputs and the reference's results.

    python tests/golden/make_unet.py FOLDER

needs torch, diffusers and safetensors, and writes into FOLDER/unet. `MODEL.VARIANT.safetensors` holds weights,
`MODEL.io.safetensors` what goes in and what must come out: `CASE.x`, `CASE.timesteps`, `CASE.context`, sometimes
`CASE.y` and `CASE.control.LIST.NUMBER` (with a `length` where there are holes), and `CASE.out`. Every parameter is
drawn anew: the usual start values (norm weights of one, biases of zero) would hide a layer that is left out.
"""

import math
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

TOKENS = 7


def redraw(model: UNet2DConditionModel, seed: int) -> UNet2DConditionModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
            # Every value is one that half precision holds: files of either type have the same results.
            parameter.copy_(parameter.half())
    return model.eval()


# --- Names ---------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def single_file_name(model: UNet2DConditionModel, name: str) -> str:
    for theirs, ours in OUTSIDE.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    parts = name.split(".")
    if parts[0] == "mid_block":
        kind, number, rest = parts[1], int(parts[2]), parts[3:]
        place = f"middle_block.{1 if kind == 'attentions' else 2 * number}"
    else:
        level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        per_level = model.config.layers_per_block + (1 if parts[0] == "up_blocks" else 0)
        if parts[0] == "down_blocks":
            first = 1 + level * (per_level + 1)
            if kind == "downsamplers":
                return f"input_blocks.{first + per_level}.0.op.{rest[-1]}"
            place = f"input_blocks.{first + number}.{int(kind == 'attentions')}"
        else:
            first = level * per_level
            if kind == "upsamplers":
                attends = int(hasattr(model.up_blocks[level], "attentions"))
                return f"output_blocks.{first + per_level - 1}.{1 + attends}.conv.{rest[-1]}"
            place = f"output_blocks.{first + number}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def single_file(model: UNet2DConditionModel) -> dict:
    renamed = {single_file_name(model, name): value for name, value in model.state_dict().items()}
    assert len(renamed) == len(model.state_dict())
    return renamed


# --- Cases ---------------------------------------------------------------------------------------------------


class Case:
    """One call: inputs by name, and the reference's answer."""

    def __init__(self, model: UNet2DConditionModel, seed: int, rows: int, height: int, width: int, steps: list):
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            "x": self.draw(rows, model.config.in_channels, height, width),
            "timesteps": torch.tensor(steps),
            "context": self.draw(rows, TOKENS, model.config.cross_attention_dim),
        }
        self.more = {}
        if model.config.addition_embed_type == "text_time":
            self.add_vector(rows)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def add_vector(self, rows: int) -> None:
        width = self.model.config.addition_time_embed_dim
        sizes = (self.model.config.projection_class_embeddings_input_dim - self.pooled()) // width
        pooled = self.draw(rows, self.pooled())
        ids = torch.randint(0, 1024, (rows, sizes), generator=self.generator).float()
        times = self.model.add_time_proj(ids.flatten()).reshape(rows, -1)
        self.tensors["y"] = torch.cat([pooled, times], 1)
        self.more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}

    def pooled(self) -> int:
        return 24

    def skips(self) -> list[tuple[int, int, int]]:
        """Channels and sides of what the blocks on the way down leave."""
        seen = []

        def record(module, inputs, result):
            residuals = result[1]
            seen.extend(tuple(residual.shape[1:]) for residual in residuals)

        hooks = [block.register_forward_hook(record) for block in self.model.down_blocks]
        first = self.model.conv_in(self.tensors["x"])
        self.answer()
        for hook in hooks:
            hook.remove()
        return [tuple(first.shape[1:]), *seen]

    def add_residuals(self, rows: int) -> None:
        """As a ControlNet: one tensor for each skip, and one for the middle."""
        skips = self.skips()
        output = [0.5 * self.draw(rows, *skip) for skip in skips]
        middle = 0.5 * self.draw(rows, *skips[-1])
        self.more["down_block_additional_residuals"] = output
        self.more["mid_block_additional_residual"] = middle
        for at, residual in enumerate(output):
            self.tensors[f"control.output.{at}"] = residual
        self.tensors["control.middle.0"] = middle

    def add_features(self, rows: int) -> None:
        """As a T2I adapter: after the last block of each level, which the list names by holes elsewhere."""
        skips = self.skips()
        config = self.model.config
        features = []
        for level in range(len(self.model.down_blocks)):
            at = (level + 1) * (config.layers_per_block + 1) - 1
            feature = 0.5 * self.draw(rows, *skips[at])
            features.append(feature)
            # Lists are used up from their end: the one for the first block is the last.
            self.tensors[f"control.input.{len(skips) - 1 - at}"] = feature
        self.tensors["control.input.length"] = torch.tensor(len(skips))
        self.more["down_intrablock_additional_residuals"] = features

    def answer(self) -> torch.Tensor:
        # The reference takes features out of the list.
        more = {name: list(value) if isinstance(value, list) else value for name, value in self.more.items()}
        return self.model(
            self.tensors["x"],
            self.tensors["timesteps"],
            encoder_hidden_states=self.tensors["context"],
            **more,
        ).sample

    def finished(self, name: str) -> dict:
        out = self.answer()
        assert 0.1 < out.std() < 10, f"{name}: std {out.std():.3f}"
        return {f"{name}.{key}": value for key, value in (self.tensors | {"out": out}).items()}


def write(folder: Path, name: str, tensors: dict) -> None:
    contiguous = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    save_file(contiguous, folder / f"{name}.safetensors")


def half(state: dict) -> dict:
    return {name: value.half() for name, value in state.items()}


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


# --- Models --------------------------------------------------------------------------------------------------


# At least two channels per group of 32: a normalisation of single channels takes away what the timestep adds to them.


def early(seed: int, attends: tuple[bool, ...], channels: tuple[int, ...], in_channels=4, layers=1, context=40):
    """As SD1.x: convolutions around attention, 8 heads whatever the width."""
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)]
    model = UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=context,
        attention_head_dim=8,
    )
    return redraw(model, seed)


def late(
    seed: int,
    depths,
    channels,
    layers=1,
    reverse=None,
    middle="UNetMidBlock2DCrossAttn",
    sizes=6,
    context=48,
    pooled=24,
    waves=8,
):
    """As SDXL: linear layers around attention, 64 channels per head, a vector of sizes beside the context or none."""
    attends = [depth != 0 for depth in depths]
    model = UNet2DConditionModel(
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        mid_block_type=middle,
        transformer_layers_per_block=tuple(depth or 1 for depth in depths),
        reverse_transformer_layers_per_block=reverse,
        cross_attention_dim=context,
        attention_head_dim=tuple(width // 64 for width in channels),
        use_linear_projection=True,
        addition_embed_type="text_time" if sizes else None,
        addition_time_embed_dim=waves,
        projection_class_embeddings_input_dim=pooled + waves * sizes,
    )
    return redraw(model, seed)


def write_early(folder: Path) -> None:
    model = early(1, (True, True, False), (64, 64, 64))
    plain = Case(model, 11, 2, 18, 18, [981.0, 13.37]).finished("plain")
    wide = Case(model, 12, 3, 7, 12, [0.0, 500.0, 999.0]).finished("wide")
    controlled = Case(model, 13, 2, 10, 14, [720.0, 720.0])
    controlled.add_residuals(2)
    shared = Case(model, 14, 2, 8, 8, [300.0, 20.5])
    shared.add_residuals(1)
    features = Case(model, 15, 2, 9, 8, [300.0, 20.5])
    features.add_features(2)
    controlled, shared = controlled.finished("controlled"), shared.finished("shared")
    write(folder, "sd15.io", plain | wide | controlled | shared | features.finished("features"))
    ldm = single_file(model)
    write(folder, "sd15.diffusers", half(model.state_dict()))
    other = {"first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3), "v_pred": torch.zeros(0)}
    write(folder, "sd15.checkpoint", under("model.diffusion_model.", half(ldm)) | other)

    model = early(2, (True,), (64,), in_channels=9)
    write(folder, "inpaint.io", Case(model, 21, 2, 6, 5, [999.0, 1.0]).finished("plain"))
    write(folder, "inpaint.bare", half(single_file(model)))

    # Every normalisation sees a variance of about 1e-6: there a wrong epsilon shows.
    model = early(3, (True,), (64,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = ("conv_in", "conv1", "conv2", "time_emb_proj", "proj_in", "proj_out", "to_out.0", "ff.net.2")
            if any(f".{part}." in f".{name}" for part in small):
                parameter.mul_(1e-3)
    write(folder, "quiet.io", Case(model, 31, 2, 8, 6, [640.0, 3.25]).finished("plain"))
    write(folder, "quiet.bare", single_file(model))


def write_late(folder: Path) -> None:
    model = late(4, (0, 1), (64, 128))
    plain = Case(model, 41, 2, 9, 13, [981.0, 13.37]).finished("plain")
    controlled = Case(model, 42, 2, 6, 11, [720.0, 10.0])
    controlled.add_residuals(2)
    write(folder, "sdxl.io", plain | controlled.finished("controlled"))
    write(folder, "sdxl.bare", half(single_file(model)))

    # Distilled: other depths on the way up than down, one residual block in the middle.
    model = late(5, (1, (1,)), (64, 64), reverse=((1, 2), (2, 1)), middle="UNetMidBlock2D")
    write(folder, "ssd.io", Case(model, 51, 2, 7, 8, [981.0, 13.37]).finished("plain"))
    write(folder, "ssd.diffusers", half(model.state_dict()))

    # Attention only at levels in between, five sizes in the vector.
    model = late(6, (0, 1, 0), (64, 64, 64), sizes=5)
    write(folder, "refiner.io", Case(model, 61, 2, 18, 18, [200.0, 13.37]).finished("plain"))
    write(folder, "refiner.bare", half(single_file(model)))

    # SD2: as SDXL within the blocks, as SD1.x around them, and nothing beside the context.
    model = late(7, (1, 1, 0), (64, 128, 128), sizes=0, context=56)
    plain = Case(model, 71, 2, 13, 10, [999.0, 13.37]).finished("plain")
    controlled = Case(model, 72, 2, 8, 12, [720.0, 10.0])
    controlled.add_residuals(2)
    write(folder, "sd2.io", plain | controlled.finished("controlled"))
    write(folder, "sd2.checkpoint", under("model.diffusion_model.", half(single_file(model))))
    write(folder, "sd2.diffusers", half(model.state_dict()))

    # KOALA: nothing between the ways down and up.
    model = late(8, (0, 1, 2), (64, 64, 128), middle=None)
    plain = Case(model, 81, 2, 11, 8, [981.0, 13.37]).finished("plain")
    controlled = Case(model, 82, 2, 8, 9, [720.0, 10.0])
    controlled.add_residuals(2)
    write(folder, "koala.io", plain | controlled.finished("controlled"))
    write(folder, "koala.bare", half(single_file(model)))
    write(folder, "koala.diffusers", half(model.state_dict()))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]) / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # The models are so small that a second thread costs more than it does.
    torch.set_num_threads(1)
    write_early(folder)
    write_late(folder)


if __name__ == "__main__":
    main()
