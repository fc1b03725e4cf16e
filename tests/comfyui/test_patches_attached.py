"""What patches a network from inside works attached, bit for bit, and is refused in plain words when remote."""

from __future__ import annotations

from functools import partial

import pytest
from compare import assert_different
from workflows import merged_text_encoders, patched, txt2img

import broker as brokers

# Tiles of four latent elements: the smallest that the node makes, so that these latents have several of them.
HYPERTILE = {"tile_size": 32, "swap_size": 1, "max_depth": 0, "scale_depth": False}
PATCHES = {
    "freeu": partial(patched, patch="FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "pag": partial(patched, patch="PerturbedAttentionGuidance", scale=3.0),
    "hypertile": partial(patched, patch="HyperTile", **HYPERTILE),
    "attention-of-a-custom-node": partial(patched, patch="LunaBrokerTestsReplaceAttention"),
    "merged-text-encoders": merged_text_encoders,
}
UNPATCHED = partial(patched, patch=None)
# What the refusal must name, so that the user finds the node.
NAMED = {
    "freeu": "output_block_patch",
    "pag": "attn1",
    "hypertile": "attn1",
    "attention-of-a-custom-node": "attn1",
    # The first of the weights that no adapter can express.
    "merged-text-encoders": "position_embedding",
}


@pytest.mark.parametrize("name", PATCHES)
def test_works_attached(name, side, broker, loaders):
    attached = side("attached")
    assert_different(attached.reference(PATCHES[name]), attached.reference(UNPATCHED))
    attached.check(PATCHES[name], loaders("attached"))
    assert brokers.holds_weights(broker, attached.worker.pid), "the worker has attached nothing"


def test_attached_models_are_as_before_without_the_patch(side, loaders):
    for patch in PATCHES.values():
        side("attached").worker.run(patch(loaders("attached"))).ok()
    side("attached").check(UNPATCHED, loaders("attached"))


@pytest.mark.parametrize("name", PATCHES)
def test_refused_remote_in_plain_words(name, side, loaders):
    result = side("remote").worker.run(PATCHES[name](loaders("remote")))
    assert result.error is not None, "a patch that the broker cannot run was left out without a word"
    said = result.error["exception_message"]
    assert NAMED[name] in said, said
    assert "attached" in said, f"no way out is named: {said}"
    side("remote").check(txt2img, loaders("remote"))
