"""Which LoRAs a workflow applies, and what it says of those that it does not. Needs no ComfyUI."""

from __future__ import annotations

from luna_broker.comfyui.prompt import Lora, parse
from luna_broker.comfyui.stack import gather

FILES = ["ink.safetensors", "styles/film.safetensors", "v1/wash.safetensors", "v2/wash.safetensors"]


def test_a_stack_comes_before_prompts_and_names_become_files() -> None:
    prompts = parse("a house <lora:film:0.8:0.6>"), parse("blurry <lora:ink:-0.5>")
    stack = gather([("ink", 0.3, 0.2)], prompts, FILES)
    assert stack.loras == (
        Lora("ink.safetensors", 0.3, 0.2),
        Lora("styles/film.safetensors", 0.8, 0.6),
        Lora("ink.safetensors", -0.5, -0.5),
    )
    assert stack.warnings == ()


def test_what_is_missing_or_unclear_is_skipped_and_told_and_the_rest_is_applied() -> None:
    prompts = (parse("a house <lora:gone:0.8> <lora:wash> <lora:ink:much> <lora:film>"),)
    stack = gather([("absent.safetensors", 1.0, 1.0)], prompts, FILES)
    assert stack.loras == (Lora("styles/film.safetensors", 1.0, 1.0),)
    told = "\n".join(stack.warnings)
    assert len(stack.warnings) == 4
    assert "no LoRA 'gone'; it was skipped" in told
    assert "no LoRA 'absent.safetensors'; it was skipped" in told
    assert "'wash' may be any of v1/wash.safetensors, v2/wash.safetensors" in told
    assert "<lora:ink:much> was skipped: 'much' is no strength" in told


def test_stacks_of_other_packs_may_be_lists_and_have_entries_that_are_nothing() -> None:
    stack = gather([["None", 1, 1], ["ink.safetensors", 1, "0.5"], ("none", 0, 0)], (), FILES)
    assert stack.loras == (Lora("ink.safetensors", 1.0, 0.5),)
    assert stack.warnings == ()


def test_nothing_is_asked_for() -> None:
    assert gather((), (parse("a house"),), FILES).loras == ()
