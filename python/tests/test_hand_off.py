"""Tensors cross to the broker and back without loss: every layout, every element type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAND_OFF, expected_marks, marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def hand_off(client: Any) -> Any:
    return client.vae(HAND_OFF)


def latent_for(vae: Any, *sides: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, vae.info["latent_channels"], *sides)


def assert_delivered(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    image = vae.decode(latent)
    ratio = vae.info["ratio"]
    height, width = latent.shape[2] * ratio, latent.shape[3] * ratio
    assert image.shape == (latent.shape[0], height, width, 3)
    assert image.dtype == torch.float32
    assert torch.equal(marks(image), expected_marks(latent))
    return image


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_float_type_arrives_exactly(hand_off: Any, dtype: torch.dtype) -> None:
    assert_delivered(hand_off, latent_for(hand_off, 16, 16).to(dtype))


@pytest.mark.parametrize(
    "relayout",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1), id="movedim"),
        pytest.param(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x.repeat(1, 1, 2, 2)[..., ::2, ::2] * 0 + x, id="sum"),
        pytest.param(lambda x: torch.stack([x, x], -1)[..., 0], id="gap-between-elements"),
        pytest.param(lambda x: torch.cat([x, x])[:1], id="part-of-a-batch"),
    ],
)
def test_strides_do_not_change_what_arrives(hand_off: Any, relayout: Any) -> None:
    latent = latent_for(hand_off, 9, 7)
    strided = relayout(latent)
    assert torch.equal(strided, latent)
    assert torch.equal(marks(hand_off.decode(strided)), marks(hand_off.decode(latent)))


def test_view_that_negates_lazily_arrives_negated(hand_off: Any) -> None:
    for sides in [(6, 5), (5, 1), (1, 1)]:
        latent = torch.randn(1, hand_off.info["latent_channels"], *sides, dtype=torch.complex64).conj().imag
        assert latent.is_neg()
        expected = expected_marks(latent.resolve_neg())
        assert torch.equal(marks(hand_off.decode(latent))[: len(expected)], expected)


class Exporter:
    """Shows nothing of a tensor but DLPack, as libraries that this package does not know do."""

    def __init__(self, tensor: torch.Tensor, **options: Any) -> None:
        self._tensor, self._options = tensor, options

    def __dlpack__(self) -> Any:
        return self._tensor.__dlpack__(**self._options)


@pytest.mark.parametrize(
    ("name", "options"), [("dltensor", {}), ("dltensor_versioned", {"max_version": (1, 0)})], ids=lambda value: value
)
def test_capsule_of_another_library_is_a_valid_input(hand_off: Any, name: str, options: dict[str, Any]) -> None:
    latent = latent_for(hand_off, 9, 7).transpose(2, 3)
    exporter = Exporter(latent, **options)
    assert f'"{name}"' in repr(exporter.__dlpack__())
    image = hand_off.decode(exporter)
    assert type(image) is np.ndarray
    np.testing.assert_array_equal(marks(image), expected_marks(latent).numpy())


def test_broadcast_dimension_arrives_expanded(hand_off: Any) -> None:
    channels = hand_off.info["latent_channels"]
    assert_delivered(hand_off, torch.randn(1, 1, 6, 5).expand(2, channels, 6, 5))


def test_numpy_goes_in_and_numpy_comes_out(hand_off: Any) -> None:
    latent = latent_for(hand_off, 8, 8).numpy()
    image = hand_off.decode(latent)
    assert type(image) is np.ndarray
    assert image.dtype == np.float32
    np.testing.assert_array_equal(marks(image), expected_marks(latent))


def test_numpy_view_with_negative_strides_arrives_in_its_own_order(hand_off: Any) -> None:
    latent = latent_for(hand_off, 8, 8).numpy()[:, ::-1, :, ::-1]
    np.testing.assert_array_equal(marks(hand_off.decode(latent)), expected_marks(latent))


def test_read_only_array_is_a_valid_input(hand_off: Any) -> None:
    latent = latent_for(hand_off, 8, 8).numpy()
    latent.flags.writeable = False
    np.testing.assert_array_equal(marks(hand_off.decode(latent)), expected_marks(latent))


def test_input_is_left_as_it_was(hand_off: Any) -> None:
    latent = latent_for(hand_off, 8, 8)
    before = latent.clone()
    hand_off.decode(latent)
    assert torch.equal(latent, before)


def test_ordinary_input_is_copied_once_and_the_result_never(hand_off: Any) -> None:
    latent = latent_for(hand_off, 16, 16)
    hand_off.decode(latent)
    assert hand_off.last.bytes_copied_in == latent.numel() * latent.element_size()
    assert hand_off.last.bytes_copied_out == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensor_born_shared_is_not_copied(client: Any, hand_off: Any, dtype: torch.dtype) -> None:
    latent = client.empty((1, hand_off.info["latent_channels"], 16, 16), dtype)
    assert latent.dtype == dtype
    latent.copy_(torch.randn(latent.shape))
    assert_delivered(hand_off, latent)
    assert hand_off.last.bytes_copied_in == 0
    assert hand_off.last.bytes_copied_out == 0


def test_tensor_born_shared_is_read_anew_by_every_call(client: Any, hand_off: Any) -> None:
    latent = client.empty((1, hand_off.info["latent_channels"], 8, 8), torch.float32)
    for value in (0.25, -3.0):
        latent.fill_(value)
        image = assert_delivered(hand_off, latent)
        assert torch.equal(marks(image), torch.full((16,), value))


def test_nan_and_infinity_pass_through(hand_off: Any) -> None:
    latent = latent_for(hand_off, 4, 4)
    latent.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    arrived = marks(hand_off.decode(latent))
    assert torch.equal(arrived.nan_to_num(7.0), expected_marks(latent).nan_to_num(7.0))
    assert arrived[0].isnan()


def test_reply_tells_how_the_call_went(hand_off: Any) -> None:
    hand_off.decode(latent_for(hand_off, 8, 8))
    assert hand_off.last.mode == "full"
    assert hand_off.last.queued_s >= 0
    assert hand_off.last.run_s >= 0


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch": draw(st.integers(1, 3)),
        "height": draw(st.integers(2, 12)),
        "width": draw(st.integers(2, 12)),
        "order": draw(st.permutations(range(4))),
        "steps": draw(st.tuples(*[st.integers(1, 3)] * 4)),
        "starts": draw(st.tuples(*[st.integers(0, 2)] * 4)),
        "dtype": draw(st.sampled_from(FLOATS)),
        "seed": draw(st.integers(0, 2**31)),
    }


def laid_out(layout: dict[str, Any], channels: int) -> torch.Tensor:
    """A tensor of the wanted shape cut, with gaps and in any order of axes, out of a larger one."""
    shape = (layout["batch"], channels, layout["height"], layout["width"])
    order, steps, starts = layout["order"], layout["steps"], layout["starts"]
    generator = torch.Generator().manual_seed(layout["seed"])
    whole = [starts[axis] + shape[axis] * steps[axis] for axis in order]
    memory = torch.randn(whole, generator=generator).to(layout["dtype"])
    view = memory.permute([order.index(axis) for axis in range(4)])
    for axis in range(4):
        cut = slice(starts[axis], starts[axis] + shape[axis] * steps[axis], steps[axis])
        view = view[(slice(None),) * axis + (cut,)]
    assert view.shape == shape
    return view


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_any_layout_arrives_in_row_major_order(lasting_client: Any, layout: dict[str, Any]) -> None:
    vae = lasting_client.vae(HAND_OFF)
    assert_delivered(vae, laid_out(layout, vae.info["latent_channels"]))
