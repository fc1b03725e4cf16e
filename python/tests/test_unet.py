"""UNets that the broker runs, from Python."""

import os
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("LUNA_BROKER_GOLDEN", "")) / "unet"
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="LUNA_BROKER_GOLDEN names no folder made by tests/golden/make_unet.py"
)


class Case:
    """One generated call with its result."""

    def __init__(self, model: str, name: str) -> None:
        tensors = load_file(GOLDEN / f"{model}.io.safetensors")
        self.own = {
            key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")
        }
        self.out = self.own["out"]
        self.inputs = {key: self.own[key] for key in ("x", "timesteps", "context", "y") if key in self.own}

    @property
    def control(self) -> dict[str, list[torch.Tensor | None]]:
        lists: dict[str, list[torch.Tensor | None]] = {}
        for part in ("input", "middle", "output"):
            length = self.own.get(f"control.{part}.length")
            count = int(length) if length is not None else sum(key.startswith(f"control.{part}.") for key in self.own)
            lists[part] = [self.own.get(f"control.{part}.{at}") for at in range(count)]
        return lists


@pytest.mark.parametrize(("model", "file"), [("sd15", "sd15.checkpoint"), ("sdxl", "sdxl.bare")])
def test_a_step_is_the_references_in_torch_and_numpy(client: Any, model: str, file: str) -> None:
    unet, case = client.unet(GOLDEN / f"{file}.safetensors"), Case(model, "plain")
    got = unet(**case.inputs)
    assert got.shape == case.out.shape
    assert got.dtype == case.inputs["x"].dtype
    assert (got - case.out).abs().max() <= TOLERANCE
    arrays = unet(**{key: tensor.numpy() for key, tensor in case.inputs.items()})
    assert isinstance(arrays, np.ndarray)
    assert np.array_equal(arrays, got.numpy())
    assert unet.last.mode is None
    assert unet.last.run_s > 0
    assert unet.info["service"] == "unet"


def test_control_is_taken_as_comfyui_passes_it(client: Any) -> None:
    unet, case = client.unet(GOLDEN / "sd15.checkpoint.safetensors"), Case("sd15", "controlled")
    got = unet(**case.inputs, control=case.control)
    assert (got - case.out).abs().max() <= TOLERANCE
    assert (unet(**case.inputs) - got).abs().max() > 1e-3
    with pytest.raises(TypeError, match="sideways"):
        unet(**case.inputs, control={"sideways": []})


def test_half_precision_comes_back_as_it_went(client: Any) -> None:
    unet, case = client.unet(GOLDEN / "sd15.checkpoint.safetensors"), Case("sd15", "plain")
    got = unet(**{**case.inputs, "x": case.inputs["x"].half()})
    assert got.dtype == torch.float16
    assert (got.float() - case.out).abs().max() < 2e-2


def test_what_does_not_fit_is_refused_by_name(client: Any) -> None:
    unet, case = client.unet(GOLDEN / "sd15.checkpoint.safetensors"), Case("sd15", "plain")
    with pytest.raises(luna_broker.InvalidTensor, match="context"):
        unet(**{**case.inputs, "context": case.inputs["context"][..., :7]})
    with pytest.raises(luna_broker.InvalidTensor, match="no place for y"):
        unet(**case.inputs, y=torch.zeros(case.out.shape[0], 16))
    with pytest.raises(luna_broker.InvalidModel):
        client.vae(GOLDEN / "sdxl.bare.safetensors")
    assert (unet(**case.inputs) - case.out).abs().max() <= TOLERANCE
