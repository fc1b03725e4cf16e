"""Writes small VAE files in every naming they are published in, with inputs and the reference's results.

    python tests/golden/make_vae.py FOLDER

needs torch, diffusers and safetensors. `MODEL.VARIANT.safetensors` holds weights, `MODEL.io.safetensors` what goes
in and what must come out. Every parameter is drawn anew: the usual start values (norm weights of one, biases of
zero) would hide a layer that is left out.
"""

import math
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch import nn


def redraw(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
    return model.eval()


# --- Names ---------------------------------------------------------------------------------------------------


def ldm_name(name: str, levels: int) -> str:
    """A diffusers name of AutoencoderKL as single-file checkpoints have it."""
    parts = name.split(".")
    half, section = parts[0], parts[1]
    if section in ("down_blocks", "up_blocks"):
        level = int(parts[2])
        stem = f"down.{level}" if section == "down_blocks" else f"up.{levels - 1 - level}"
        if parts[3] == "resnets":
            rest = f"{stem}.block.{parts[4]}." + ".".join(parts[5:])
        else:
            rest = f"{stem}.{parts[3].removesuffix('rs').removesuffix('e')}e.conv.{parts[-1]}"
    elif section == "mid_block" and parts[2] == "resnets":
        rest = f"mid.block_{int(parts[3]) + 1}." + ".".join(parts[4:])
    elif section == "mid_block":
        layer = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
        rest = f"mid.attn_1.{layer}.{parts[-1]}"
    else:
        rest = ".".join(parts[1:]).replace("conv_norm_out", "norm_out")
    return f"{half}." + rest.replace("conv_shortcut", "nin_shortcut")


def to_ldm(state: dict, levels: int, kernels: bool = True) -> dict:
    renamed = {}
    for name, value in state.items():
        target = name if "quant_conv" in name else ldm_name(name, levels)
        if kernels and ".attn_1." in target and value.ndim == 2:
            value = value[:, :, None, None]
        renamed[target] = value
    return renamed


def to_old_diffusers(state: dict) -> dict:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        if ".attentions." in name:
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = value
    return renamed


def tiny_half(state: dict, half: str, prefix: str) -> dict:
    """One half of an AutoencoderTiny with the numbers that its original has: the decoder's start with a clamp."""
    start, shift = f"{half}.layers.", 1 if half == "decoder" else 0
    renamed = {}
    for name, value in state.items():
        if name.startswith(start):
            number, rest = name.removeprefix(start).split(".", 1)
            renamed[f"{prefix}{int(number) + shift}.{rest}"] = value
    return renamed


# --- References ----------------------------------------------------------------------------------------------


class Reference:
    """Raw latents and images in 0…1, as the broker's callers have them."""

    ratio = 8

    def decode_unclamped(self, latent: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def encode_nchw(self, image: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class KlReference(Reference):
    def __init__(self, model: AutoencoderKL):
        self.model = model
        self.ratio = 2 ** (len(model.config.block_out_channels) - 1)

    def decode_unclamped(self, latent):
        return (self.model.decode(latent).sample + 1) / 2

    def encode_nchw(self, image):
        return self.model.encode(image * 2 - 1).latent_dist.mode()


class TinyReference(Reference):
    def __init__(self, encoder, decoder, scale=1.0, shift=0.0):
        self.encoder, self.decoder, self.scale, self.shift = encoder, decoder, scale, shift

    def decode_unclamped(self, latent):
        return self.decoder((latent - self.shift) * self.scale)

    def encode_nchw(self, image):
        return self.encoder(image) / self.scale + self.shift


class PooledBlock(nn.Module):
    def __init__(self, width: int, pooled: bool):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x):
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Soften(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def pooled_halves(width: int, latent: int) -> tuple[nn.Sequential, nn.Sequential]:
    def conv(inner, out, **more):
        return nn.Conv2d(inner, out, 3, padding=1, **more)

    encoder = [conv(3, width), PooledBlock(width, False)]
    decoder = [Soften(), conv(latent, width), nn.ReLU()]
    for stage in range(3):
        encoder += [conv(width, width, stride=2, bias=False)] + [PooledBlock(width, stage == 2) for _ in range(3)]
        decoder += [PooledBlock(width, stage == 0) for _ in range(3)]
        decoder += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    encoder += [conv(width, latent)]
    decoder += [PooledBlock(width, False), conv(width, 3)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


# --- Tiles ---------------------------------------------------------------------------------------------------


def starts(size: int, tile: int, overlap: int) -> list[int]:
    return [0] if size <= tile else list(range(0, size - overlap, tile - overlap))


def ramp(length: int, feather: int) -> torch.Tensor:
    weights = torch.ones(length)
    if feather < length:
        rising = torch.arange(1, feather + 1) / feather
        weights[:feather] *= rising
        weights[length - feather :] *= rising.flip(0)
    return weights


def one_pass(function, x, rows, columns, overlap, scale) -> torch.Tensor:
    """Tiles of rows × columns faded into each other; `scale` is output elements per input element."""
    total, weights = None, None
    if x.shape[2] <= rows and x.shape[3] <= columns:
        return function(x)
    feather = round(overlap * scale)
    for top in starts(x.shape[2], rows, overlap):
        for left in starts(x.shape[3], columns, overlap):
            tile = function(x[:, :, top : top + rows, left : left + columns])
            fade = ramp(tile.shape[2], feather)[:, None] * ramp(tile.shape[3], feather)[None, :]
            if total is None:
                size = [round(side * scale) for side in x.shape[2:]]
                total, weights = torch.zeros(1, tile.shape[1], *size), torch.zeros(1, 1, *size)
            y, z = round(top * scale), round(left * scale)
            total[:, :, y : y + tile.shape[2], z : z + tile.shape[3]] += tile * fade
            weights[:, :, y : y + tile.shape[2], z : z + tile.shape[3]] += fade
    return total / weights


def tiled(function, batch, width, height, overlap, scale) -> torch.Tensor:
    shapes = [(height * 2, width // 2), (height // 2, width * 2), (height, width)]
    samples = []
    for x in batch.split(1):
        passes = [one_pass(function, x, rows, columns, overlap, scale) for rows, columns in shapes]
        samples.append(sum(passes) / 3)
    return torch.cat(samples)


# --- Cases ---------------------------------------------------------------------------------------------------


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 1).movedim(1, -1).contiguous()


def cropped(image: torch.Tensor, ratio: int) -> torch.Tensor:
    for dim in (1, 2):
        extra = image.shape[dim] % ratio
        image = image.narrow(dim, extra // 2, image.shape[dim] - extra)
    return image.movedim(-1, 1)


@torch.no_grad()
def cases(reference: Reference, latent_channels: int, tiles: tuple[int, int, int], seed: int) -> dict:
    torch.manual_seed(seed)
    ratio = reference.ratio
    latent = torch.randn(3, latent_channels, 7, 5)
    image = torch.rand(3, 4 * ratio + (ratio + 2) // 2, 6 * ratio + ratio - 1, 3)
    long_latent = torch.randn(1 if ratio > 4 else 2, latent_channels, 13, 18)
    long_image = torch.rand(1, 18 * ratio, 13 * ratio, 3)
    width, height, overlap = tiles
    pixels = [side * ratio for side in tiles]
    decoded = reference.decode_unclamped(latent)
    outside = ((decoded < 0) | (decoded > 1)).float().mean().item()
    assert outside < 0.25 and decoded.std() > 0.02, f"{outside:.2f} of the image is clamped, std {decoded.std():.3f}"
    return {
        "latent": latent,
        "decoded": nhwc(decoded),
        "latent_half": latent[1:2].half(),
        "decoded_half": nhwc(reference.decode_unclamped(latent[1:2].half().float())),
        "image": image,
        "encoded": reference.encode_nchw(cropped(image, ratio)),
        "decode_tiles": torch.tensor(tiles),
        "long_latent": long_latent,
        "decoded_in_tiles": nhwc(tiled(reference.decode_unclamped, long_latent, width, height, overlap, ratio)),
        "encode_tiles": torch.tensor(pixels),
        "long_image": long_image,
        "encoded_in_tiles": tiled(reference.encode_nchw, long_image.movedim(-1, 1), *pixels, 1 / ratio),
    }


class Writer:
    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, tensors: dict) -> None:
        save_file(
            {key: value.detach().contiguous().clone() for key, value in tensors.items()},
            self.folder / f"{name}.safetensors",
        )


@torch.no_grad()
def centre(layer: nn.Conv2d, run, channels_in: int, spread: float, middle: float) -> None:
    """Scales the last layer of a half so that its results are as large as a trained one's."""
    result = run(torch.randn(2, channels_in, 24, 16, generator=torch.Generator().manual_seed(99)))
    factor = spread / result.std()
    layer.weight.mul_(factor)
    layer.bias.copy_((layer.bias - result.mean((0, 2, 3))) * factor + middle)


def kl(seed: int, **config) -> AutoencoderKL:
    levels = len(config["block_out_channels"])
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    )
    redraw(model, seed)
    centre(
        model.decoder.conv_out,
        lambda latent: model.decode(latent).sample,
        config["latent_channels"],
        0.4,
        0.0,
    )
    return model


def round_to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes every parameter one that `dtype` holds exactly, so that files of any type have the same results."""
    return model.to(dtype).float()


def only(state: dict, half: str) -> dict:
    quant = {"decoder": "post_quant_conv.", "encoder": "quant_conv."}[half]
    return {name: value for name, value in state.items() if name.startswith((f"{half}.", quant))}


def converted(state: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) for name, value in state.items()}


def write_kl(writer: Writer) -> None:
    model = round_to(kl(1, block_out_channels=(32, 64), layers_per_block=1, latent_channels=4), torch.half)
    writer.write("kl4.io", cases(KlReference(model), 4, (16, 12, 2), 11))
    state = converted(model.state_dict(), torch.half)
    ldm = to_ldm(state, 2)
    writer.write("kl4.ldm", ldm)
    writer.write("kl4.diffusers-decoder", only(state, "decoder"))
    writer.write("kl4.old-diffusers-encoder", to_old_diffusers(only(state, "encoder")))
    writer.write("kl4.ldm-matrices-encoder", to_ldm(only(state, "encoder"), 2, kernels=False))
    other = {
        "model.diffusion_model.time_embed.0.weight": torch.zeros(4, 4),
        "logit_scale": torch.zeros(()),
    }
    writer.write(
        "kl4.checkpoint-encoder",
        {f"first_stage_model.{n}": v for n, v in only(ldm, "encoder").items()} | other,
    )

    # Three levels, uneven widths, no quant convolutions: as SD3 and Flux have it.
    config = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "latent_channels": 16}
    model = round_to(kl(2, use_quant_conv=False, use_post_quant_conv=False, **config), torch.bfloat16)
    writer.write("kl16.io", cases(KlReference(model), 16, (8, 16, 3), 13))
    writer.write("kl16.ldm", converted(to_ldm(model.state_dict(), 3), torch.bfloat16))

    # The first normalisations see a variance of about 1e-6: there a wrong epsilon shows. No attention either.
    config = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
    model = kl(4, mid_block_add_attention=False, **config)
    for half in (model.encoder, model.decoder):
        half.conv_in.weight.mul_(1e-3)
        half.conv_in.bias.mul_(1e-3)
    writer.write("quiet.io", cases(KlReference(model), 4, (12, 8, 2), 15))
    writer.write("quiet.ldm", to_ldm(model.state_dict(), 2))


def tiny(seed: int, latent: int) -> AutoencoderTiny:
    model = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        latent_channels=latent,
    )
    redraw(model, seed, gain=1.2)
    centre(model.decoder.layers[-1], lambda x: (model.decoder(x) + 1) / 2, latent, 0.2, 0.5)
    centre(model.encoder.layers[-1], model.encoder, 3, 1.0, 0.0)
    return model


def tiny_reference(model: AutoencoderTiny, scale: float, shift: float) -> TinyReference:
    # The class works on images in -1…1 at both ends.
    return TinyReference(
        lambda image: model.encoder(image * 2 - 1),
        lambda latent: (model.decoder(latent) + 1) / 2,
        scale,
        shift,
    )


def write_tiny(writer: Writer) -> None:
    model = tiny(5, 4)
    state = model.state_dict()
    writer.write("tiny4.io", cases(tiny_reference(model, 1, 0), 4, (16, 12, 4), 16))
    writer.write("tiny4.diffusers", state)
    writer.write("tiny4.bare-decoder", tiny_half(state, "decoder", ""))
    writer.write("tiny4.bare-encoder", tiny_half(state, "encoder", ""))
    writer.write(
        "tiny4.plain",
        tiny_half(state, "decoder", "decoder.") | tiny_half(state, "encoder", "encoder."),
    )

    scales = {"vae_scale": torch.tensor(0.75), "vae_shift": torch.tensor(-0.125)}
    writer.write("scaled4.io", cases(tiny_reference(model, 0.75, -0.125), 4, (8, 16, 2), 17))
    joined = tiny_half(state, "decoder", "taesd_decoder.") | tiny_half(state, "encoder", "taesd_encoder.")
    writer.write("scaled4.joined", joined | scales)

    # Scale and shift come from the name alone.
    model = tiny(6, 16)
    writer.write("taesd3like.io", cases(tiny_reference(model, 1.5305, 0.0609), 16, (16, 16, 2), 18))
    writer.write("taesd3like.diffusers", model.state_dict())

    encoder, decoder = pooled_halves(8, 32)
    redraw(encoder, 7, gain=1.2)
    redraw(decoder, 8, gain=1.2)
    centre(decoder[19], decoder, 32, 0.2, 0.5)
    centre(encoder[14], encoder, 3, 1.0, 0.0)
    writer.write("pooled32.io", cases(TinyReference(encoder, decoder), 32, (16, 8, 2), 19))
    state = {f"taesd_encoder.{name}": value for name, value in encoder.state_dict().items()}
    writer.write(
        "pooled32.joined",
        state | {f"taesd_decoder.{name}": value for name, value in decoder.state_dict().items()},
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # The models are so small that a second thread costs more than it does.
    torch.set_num_threads(1)
    writer = Writer(folder)
    write_kl(writer)
    write_tiny(writer)


if __name__ == "__main__":
    main()
