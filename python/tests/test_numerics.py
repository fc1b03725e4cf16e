"""What the broker computes is what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_taesd as reference
import torch
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5

SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= limit, f"largest difference {difference:.3g}, allowed {limit:.3g}"


def test_round_trip_of_the_constructed_model_keeps_the_colours_of_blocks(client: Any, constructed_vae: str) -> None:
    from constructed import block_average, picture
    from pictures import psnr_db

    image = picture(128)
    vae = client.vae(constructed_vae)
    decoded = vae.decode(vae.encode(torch.from_numpy(image)[None]))[0].numpy()
    assert psnr_db(decoded, block_average(image)) >= 60.0
    assert psnr_db(decoded, image) >= 18.0


def test_facts_about_the_model(client: Any, constructed_vae: str) -> None:
    info = client.vae(constructed_vae).info
    assert info["family"] == "taesd"
    assert info["latent_channels"] == 4
    assert info["ratio"] == 8
    # The weights alone; a file also has a header.
    assert 0 < info["bytes"] <= Path(constructed_vae).stat().st_size


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_constructed_model_equals_the_reference(
    lasting_client: Any,
    constructed_vae: str,
    constructed_state: dict[str, torch.Tensor],
    batch: int,
    height: int,
    width: int,
    seed: int,
) -> None:
    vae = lasting_client.vae(constructed_vae)
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 8 * height, 8 * width, 3, generator=generator)
    latent = vae.encode(image)
    assert_close(latent, reference.encode(constructed_state, image))
    assert_close(vae.decode(latent), reference.decode(constructed_state, latent))


@pytest.mark.parametrize("channels", [4, 16])
def test_untrained_weights_equal_the_reference(client: Any, tmp_path: Path, channels: int) -> None:
    state = reference.random_state(channels, seed=channels)
    path = tmp_path / "untrained.safetensors"
    save_file(state, path)
    vae = client.vae(str(path))
    assert vae.info["latent_channels"] == channels
    latent = torch.randn(1, channels, 7, 12)
    image = torch.rand(2, 48, 64, 3)
    assert_close(vae.decode(latent), reference.decode(state, latent))
    assert_close(vae.encode(image), reference.encode(state, image))


def test_scale_and_shift_in_the_file_are_applied(client: Any, tmp_path: Path) -> None:
    state = reference.random_state(4, seed=7)
    path = tmp_path / "scaled.safetensors"
    scaling = {"vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.125)}
    save_file({**state, **scaling}, path)
    vae = client.vae(str(path))
    latent, image = torch.randn(1, 4, 6, 6), torch.rand(1, 48, 48, 3)
    assert_close(vae.decode(latent), reference.decode(state, latent, 0.5, 0.125))
    assert_close(vae.encode(image), reference.encode(state, image, 0.5, 0.125))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_input_of_each_float_type_is_computed_in_float32(client: Any, constructed_vae: str, dtype: torch.dtype) -> None:
    vae = client.vae(constructed_vae)
    latent, image = torch.randn(1, 4, 6, 6).to(dtype), torch.rand(1, 16, 24, 3).to(dtype)
    assert_close(vae.decode(latent), vae.decode(latent.float()), 0.0)
    assert_close(vae.encode(image), vae.encode(image.float()), 0.0)


def test_strided_input_gives_the_same_result_as_contiguous(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    latent = torch.randn(1, 4, 10, 6)
    channels_last = latent.to(memory_format=torch.channels_last)
    assert_close(vae.decode(channels_last), vae.decode(latent), 0.0)
    planes = torch.rand(1, 3, 24, 40)
    image = planes.movedim(1, -1)
    assert not image.is_contiguous()
    assert_close(vae.encode(image), vae.encode(image.contiguous()), 0.0)


def test_numpy_gives_the_same_result_as_torch(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    image = torch.rand(1, 24, 40, 3)
    latent = vae.encode(image.numpy())
    assert type(latent) is np.ndarray
    np.testing.assert_array_equal(latent, vae.encode(image).numpy())
    np.testing.assert_array_equal(vae.decode(latent), vae.decode(torch.from_numpy(latent)).numpy())


def test_batch_gives_the_same_results_as_one_by_one(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    latents = torch.randn(3, 4, 5, 7)
    together = vae.decode(latents)
    for number in range(3):
        assert_close(together[number], vae.decode(latents[number : number + 1])[0])


@pytest.mark.parametrize(("height", "width"), [(67, 75), (15, 8), (72, 79)])
def test_image_is_cropped_around_its_centre(client: Any, constructed_vae: str, height: int, width: int) -> None:
    vae = client.vae(constructed_vae)
    image = torch.rand(1, height, width, 3)
    top, left = height % 8 // 2, width % 8 // 2
    centre = image[:, top : top + height // 8 * 8, left : left + width // 8 * 8]
    assert_close(vae.encode(image), vae.encode(centre), 0.0)


def test_result_is_clamped_to_the_range_of_images(client: Any, constructed_vae: str) -> None:
    image = client.vae(constructed_vae).decode(torch.randn(1, 4, 8, 8) * 20)
    assert image.min() == 0.0
    assert image.max() == 1.0


def test_tiles_of_a_model_without_neighbourhood_add_up_to_the_whole(client: Any, constructed_vae: str) -> None:
    vae = client.vae(constructed_vae)
    image = torch.rand(1, 160, 208, 3)
    latent = vae.encode(image)
    assert vae.last.mode == "full"
    whole = vae.decode(latent)
    tiles = vae.decode_tiled(latent, tile_x=12, tile_y=10, overlap=4)
    assert vae.last.mode == "tiled"
    assert_close(tiles, whole)
    assert_close(vae.encode_tiled(image, tile_x=96, tile_y=80, overlap=16), latent)
    assert vae.last.mode == "tiled"


def test_trained_model_equals_the_reference_and_looks_like_the_photograph(client: Any) -> None:
    checkpoint, photograph = SHARED_DATA / "taef2.safetensors", SHARED_DATA / "photo.png"
    if not (checkpoint.is_file() and photograph.is_file()):
        pytest.skip(f"no trained model and photograph in {SHARED_DATA}")
    from pictures import psnr_db, read

    state = load_file(checkpoint)
    image = torch.from_numpy(read(photograph, 256))[None]
    vae = client.vae(str(checkpoint))
    with torch.inference_mode():
        expected_latent = reference.encode(state, image)
        expected = reference.decode(state, expected_latent)
    assert_close(vae.encode(image), expected_latent, 1e-4)
    decoded = vae.decode(expected_latent.clone())
    assert_close(decoded, expected, 1e-4)
    assert psnr_db(decoded[0].numpy(), image[0].numpy()) > 25.0
