"""Text encoders that the broker runs, from Python."""

import os
from pathlib import Path
from typing import Any

import luna_broker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("LUNA_BROKER_GOLDEN", "")) / "clip"
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "words.io.safetensors").is_file(),
    reason="LUNA_BROKER_GOLDEN names no folder with what tests/golden/make_clip.py made",
)


def cases(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.io.safetensors")


def encoders(client: Any, *names: str) -> Any:
    return client.clip(*(GOLDEN / f"{name}.safetensors" for name in names))


def chunks(ids: torch.Tensor, weights: torch.Tensor | None = None) -> list[list[tuple[Any, float]]]:
    """What a tokenizer of ComfyUI's gives."""
    weights = torch.ones(ids.shape) if weights is None else weights
    return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), weights.tolist(), strict=True)]


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


def test_text_becomes_the_references_results(client: Any) -> None:
    clip, expected = encoders(client, "words.g", "words.l"), cases("words")
    cond, pooled = clip.encode("a photo of a cat")
    assert isinstance(cond, torch.Tensor)
    assert off(cond, expected["cat.cond"]) <= TOLERANCE
    assert off(pooled, expected["cat.pooled"]) <= TOLERANCE
    assert off(clip.encode("a photo of a (cat:1.3)")[0], expected["weighted.cond"]) <= TOLERANCE
    assert off(clip.encode("a photo of a cat", skip=1)[0], expected["last.cond"]) <= TOLERANCE
    assert off(clip.encode("a photo of a cat", project=False)[1], expected["cat.plain"]) <= TOLERANCE
    assert off(clip.encode("word " * 120)[0], expected["long.cond"]) <= TOLERANCE
    cond, pooled = clip.encode("word " * 120, text_g="a photo of a cat", device="cpu")
    assert off(cond, expected["split.cond"]) <= TOLERANCE
    assert off(pooled, expected["cat.pooled"]) <= TOLERANCE
    assert clip.last.ignored == []
    assert clip.last.run_s > 0
    assert clip.last.bytes_copied_out == 0


def test_embeddings_come_from_the_brokers_folders_and_missing_ones_are_named(start_broker: Any) -> None:
    broker = start_broker("--embeddings", str(GOLDEN / "embeddings"))
    with luna_broker.connect(broker.address) as client:
        clip = encoders(client, "words.l", "words.g")
        cond, _ = clip.encode("a photo of embedding:style")
        assert off(cond, cases("words")["embedding.cond"]) <= TOLERANCE
        clip.encode("a photo of embedding:nowhere")
        [(name, reason)] = clip.last.ignored
        assert name == "nowhere"
        assert "no such file" in reason


def test_tokens_are_taken_as_comfyui_passes_them(client: Any) -> None:
    clip, expected = encoders(client, "clip_l.transformers"), cases("clip_l")
    short = chunks(expected["short"])
    assert off(clip.encode_tokens({"l": short})[0], expected["short.cond"]) <= TOLERANCE
    weighted = chunks(expected["long"], expected["weights"])
    assert off(clip.encode_tokens({"clip_l": weighted})[0], expected["weighted.cond"]) <= TOLERANCE
    assert off(clip.encode_tokens({"l": short}, skip=3)[0], expected["skip3.cond"]) <= TOLERANCE
    # Numbers of words, which ComfyUI may put behind each weight.
    numbered = [[(*at, number) for number, at in enumerate(chunk)] for chunk in short]
    assert off(clip.encode_tokens({"l": numbered})[0], expected["short.cond"]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["torch", "numpy", "parameter", "half", "strided"])
def test_vectors_may_stand_where_tokens_do(client: Any, kind: str) -> None:
    clip, expected = encoders(client, "clip_l.transformers"), cases("clip_l")
    rows = expected["rows"]
    if kind == "half":
        rows = rows.half()
    elif kind == "strided":
        rows = rows.repeat_interleave(2, dim=1)[:, ::2]
    tokens = chunks(expected["short"])
    for place, row in zip(expected["places"].tolist(), rows, strict=True):
        given = {"numpy": row.numpy(), "parameter": torch.nn.Parameter(row)}.get(kind, row)
        tokens[0][place] = (given, 1.0)
    cond, _ = clip.encode_tokens({"l": tokens})
    assert off(cond, expected["rows.cond"]) <= (1e-2 if kind == "half" else TOLERANCE)


def test_a_set_of_two_files_is_one(client: Any) -> None:
    expected = cases("sdxl")
    tokens = {"g": chunks(expected["g"]), "l": chunks(expected["l"])}
    for names in (["sdxl.checkpoint"], ["clip_g.transformers", "clip_l.transformers"]):
        clip = encoders(client, *names)
        cond, pooled = clip.encode_tokens(tokens)
        assert off(cond, expected["cond"]) <= TOLERANCE
        assert off(pooled, expected["pooled"]) <= TOLERANCE
        assert clip.info["service"] == "clip"
        assert [encoder["kind"] for encoder in clip.info["clip"]["encoders"]] == ["clip_l", "clip_g"]
        assert len(clip.info["clip"]["files"]) == len(names)


def test_what_does_not_fit_is_refused_by_name(client: Any) -> None:
    clip, expected = encoders(client, "clip_l.transformers"), cases("clip_l")
    short = chunks(expected["short"])
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (luna_broker.InvalidTensor, "clip_g, which is not loaded", {"g": short}),
        (luna_broker.InvalidTensor, "none for clip_l", {}),
        (luna_broker.InvalidTensor, "one length", {"l": [short[0], short[0][:5]]}),
        (luna_broker.InvalidTensor, r"rows, 128\]", {"l": [[(torch.zeros(5), 1.0)]]}),
        (luna_broker.InvalidTensor, "vector of numbers", {"l": [[(torch.zeros(1, 128), 1.0)]]}),
        (ValueError, "no text encoder .q.", {"q": short}),
        (ValueError, "no token -1", {"l": [[(-1, 1.0)]]}),
        (TypeError, "torch tensor", {"l": [[("word", 1.0)]]}),
    ]
    for kind, says, tokens in wrong:
        with pytest.raises(kind, match=says):
            clip.encode_tokens(tokens)
    for skip in (0, -2, 1 << 40):
        with pytest.raises(luna_broker.ConfigurationError, match="skip="):
            clip.encode_tokens({"l": short}, skip=skip)
    with pytest.raises(luna_broker.InvalidTensor, match="clip_g"):
        clip.encode("a", text_g="b")
    with pytest.raises(luna_broker.ModelNotFound):
        client.clip()
    with pytest.raises(luna_broker.Unsupported, match="together"):
        encoders(client, "clip_l.transformers", "clip_h.checkpoint")
    assert off(clip.encode_tokens({"l": short})[0], expected["short.cond"]) <= TOLERANCE


def test_sizes_become_the_vector_that_sdxl_takes() -> None:
    expected = cases("sdxl")
    pooled = expected["vector.pooled"][None]
    sizes = {"original": (1024, 832), "crop": (16, 0)}
    base = luna_broker.sdxl_vector(pooled, **sizes, target=(1152, 896))
    assert isinstance(base, torch.Tensor)
    assert off(base[0], expected["vector.base"]) <= TOLERANCE
    refiner = luna_broker.sdxl_vector(pooled.numpy(), **sizes, aesthetic=2.5)
    assert isinstance(refiner, np.ndarray)
    assert off(torch.from_numpy(refiner)[0], expected["vector.refiner"]) <= TOLERANCE
    real = torch.zeros(3, 1280, dtype=torch.float16)
    assert luna_broker.sdxl_vector(real, (1024, 1024)).shape == (3, 2816)
    assert luna_broker.sdxl_vector(real, (1024, 1024), aesthetic=6).shape == (3, 2560)
    with pytest.raises(ValueError, match="no target"):
        luna_broker.sdxl_vector(real, (1, 1), target=(1, 1), aesthetic=6)
    with pytest.raises(luna_broker.InvalidTensor):
        luna_broker.sdxl_vector(real[0], (1, 1))


def test_loras_of_a_prompt_are_the_references_and_leave_nothing_behind(client: Any) -> None:
    folder = GOLDEN / "lora"
    if not folder.is_dir():
        pytest.skip("run tests/golden/make_clip_lora.py too")
    cases = load_file(folder / "clip_l.io.safetensors")
    (ids,) = (ids for name, ids in cases.items() if name.startswith("ids."))
    tokens = {"clip_l": [[(int(token), 1.0) for token in chunk] for chunk in ids]}
    clip = client.clip(GOLDEN / "clip_l.transformers.safetensors")
    plain, _ = clip.encode_tokens(tokens)
    path = folder / "clip_l.lora.safetensors"
    for mode in ("auto", "side", "merged"):
        cond, _ = clip.encode_tokens(tokens, loras=[(path, 1.0)], lora_mode=mode)
        assert (cond - cases["lora@1.cond"]).abs().max() <= 3e-5
    (taken,) = clip.last.adapters
    assert taken["layers"] > 0
    assert torch.equal(clip.encode_tokens(tokens)[0], plain)
    assert clip.last.adapters == []
    with pytest.raises(luna_broker.ModelNotFound, match="nowhere"):
        clip.encode_tokens(tokens, loras=[("nowhere", 1.0)])
