"""Which LoRAs a workflow applies: those of a LoRA stack and those that its prompts name. Knows no ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luna_broker.comfyui.prompt import Lora, Prompt, find

# An entry of a stack that stands for no LoRA, as nodes of other packs leave it.
NOTHING = ("None", "none", "")


@dataclass(frozen=True)
class Stack:
    """LoRAs in the order in which they are applied, by the names of their files."""

    loras: tuple[Lora, ...]
    warnings: tuple[str, ...]
    """What was named and is not applied, each with the reason."""


def gather(stack: Iterable[Sequence[object]], prompts: Iterable[Prompt], files: Sequence[str]) -> Stack:
    """A LoRA stack, and behind it what prompts name, as far as there are `files` for them.

    `stack`: entries of a name, a strength for the diffusion model and one for the text encoders.
    """
    prompts = tuple(prompts)
    named = [Lora(str(name), float(model), float(clip)) for name, model, clip in stack if name not in NOTHING]
    warnings = [warning for prompt in prompts for warning in prompt.warnings]
    found = []
    for lora in (*named, *(lora for prompt in prompts for lora in prompt.loras)):
        try:
            found.append(lora._replace(name=find(lora.name, files)))
        except LookupError as error:
            warnings.append(f"{error}; it was skipped")
    return Stack(tuple(found), tuple(warnings))
