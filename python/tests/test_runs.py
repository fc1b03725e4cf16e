"""Sampling runs and adapters of UNets, from Python."""

import os
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("LUNA_BROKER_GOLDEN", ""))
LORA = GOLDEN / "lora"
TOLERANCE = 3e-5

pytestmark = pytest.mark.skipif(
    not LORA.is_dir(), reason="LUNA_BROKER_GOLDEN names no folder filled by tests/golden/make_unet.py and make_lora.py"
)


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(LORA / "sd15.io.safetensors")


@pytest.fixture
def unet(client: Any) -> Any:
    return client.unet(GOLDEN / "unet" / "sd15.checkpoint.safetensors")


def inputs(cases: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: cases[f"plain.{name}"] for name in ("x", "timesteps", "context")}


def test_loras_of_a_call_are_the_references_and_leave_nothing_behind(unet: Any, cases: dict[str, torch.Tensor]) -> None:
    plain = unet(**inputs(cases))
    path = LORA / "sd15.lora.safetensors"
    for mode in ("auto", "side", "merged"):
        got = unet(**inputs(cases), loras=[(path, 1)], lora_mode=mode)
        assert (got - cases["lora@1.out"]).abs().max() <= TOLERANCE
    (taken,) = unet.last.step["adapters"]
    assert taken["name"] == str(path)
    assert taken["layers"] > 0
    assert taken["unknown_keys"] == 0
    assert torch.equal(unet(**inputs(cases)), plain)
    assert unet.last.step["adapters"] == []
    assert unet.last.step["together"] == 1
    assert unet.prefetch([(path, 0.8)])[0]["layers"] == taken["layers"]


def test_a_run_takes_its_context_once(unet: Any, cases: dict[str, torch.Tensor]) -> None:
    given = inputs(cases)
    with unet.run(loras=[(LORA / "sd15.lora.safetensors", 1.0)], sigmas=[2.0, 1.0, 0.0]) as run:
        first = run(**given, conds=[0, 1])
        assert (first - cases["lora@1.out"]).abs().max() <= TOLERANCE
        assert torch.equal(run(given["x"], given["timesteps"], conds=[0, 1]), first)
        arrays = run(given["x"].numpy(), given["timesteps"].numpy(), conds=[0, 1])
        assert isinstance(arrays, np.ndarray)
        assert np.array_equal(arrays, first.numpy())
        assert run.report["steps"] == 3
        assert run.report["hits"] == 0
        assert run.report["speed_up"] == 1.0
        assert run.adapters[0]["kinds"]
        with pytest.raises(luna_broker.InvalidTensor, match="cond 5 was never sent"):
            run(given["x"], given["timesteps"], conds=[0, 5])
    with pytest.raises(luna_broker.Stale, match="closed"):
        run(**given, conds=[0, 1])


def test_a_block_cache_leaves_out_what_is_alike(client: Any, unet: Any, cases: dict[str, torch.Tensor]) -> None:
    given = inputs(cases)
    with unet.run(fb_cache={"threshold": 0.1, "start": 0.0, "end": 1.0, "max_hits": 1}) as run:
        verdicts = []
        for at in range(4):
            run(given["x"] + 1e-4 * at, torch.full((2,), 500.0 - at), given["context"], conds=[0, 1])
            verdicts.append(run.last.step["cache"]["verdict"])
        assert verdicts == ["empty", "hit", "exhausted", "hit"]
        assert run.report["hits"] == 2
        (told,) = client.status()["runs"]
        assert told["report"]["hits"] == 2
        assert told["speed_up"] > 1
    with unet.run(fb_cache=0) as run:
        run(**given, conds=[0, 1])
        run(**given, conds=[0, 1])
        assert run.last.step["cache"]["verdict"] == "different"


def test_what_cannot_be_opened_says_why(unet: Any, cases: dict[str, torch.Tensor]) -> None:
    with pytest.raises(luna_broker.ConfigurationError, match="begin before it ends"):
        unet.run(fb_cache={"threshold": 0.1, "start": 0.6, "end": 0.5})
    with pytest.raises(TypeError, match="sideways"):
        unet.run(fb_cache={"threshold": 0.1, "sideways": 1})
    with pytest.raises(ValueError, match="threshold"):
        unet.run(fb_cache={"start": 0.1})
    with pytest.raises(luna_broker.ModelNotFound, match="nowhere"):
        unet.run(loras=[("nowhere", 1.0)])
    with pytest.raises(luna_broker.ModelNotFound, match="nowhere"):
        unet(**inputs(cases), loras=[("nowhere", 1.0)])
    with pytest.raises(luna_broker.ConfigurationError, match="sideways"):
        unet.run(lora_mode="sideways")
    with pytest.raises(luna_broker.ConfigurationError, match="nan|NaN"):
        unet.run(loras=[(LORA / "sd15.lora.safetensors", float("nan"))])
