"""Whether a model really computes with the broker's memory, found by looking at where its tensors lie."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luna_broker.comfyui.overview import size
from torch import Tensor
from torch.nn import Module

Span = tuple[int, int]

# What is never shared, by nature: a MB or less, and 3 MB for the text projection of CLIP-G.
EXPECTED = {
    "*model_sampling.*": "made of settings, not of weights",
    "*noise_augmentor.*": "made of settings, not of weights",
    "*logit_scale": "float32 in the module, whatever the file has; nothing reads it",
    "*text_projection.weight": "absent from the file, or transposed while loading",
    "*vae_scale": "one number",
    "*vae_shift": "one number",
}

NAMED = 6


@dataclass
class Audit:
    """Where the tensors of a model lie."""

    shared_bytes: int = 0
    expected: dict[str, int] = field(default_factory=dict)
    """Bytes of each tensor of this process's own that is one of the `EXPECTED`."""
    private: dict[str, int] = field(default_factory=dict)
    """Bytes of each other tensor of this process's own: of these there should be none."""

    def __str__(self) -> str:
        told = f"{size(self.shared_bytes)} shared, {size(sum(self.expected.values()))} of its own"
        if self.private:
            names = ", ".join(list(self.private)[:NAMED]) + (", …" if len(self.private) > NAMED else "")
            told += f", and {size(sum(self.private.values()))} that should be shared and is not: {names}"
        return told


def audit(parts: Mapping[str, Module], spans: Sequence[Span]) -> Audit:
    """Looks at every parameter and buffer. `parts`: modules by what their tensors' names begin with."""
    found = Audit()
    for prefix, part in parts.items():
        for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            count = tensor.numel() * tensor.element_size()
            if lies_in(tensor, spans):
                found.shared_bytes += count
            elif any(fnmatch.fnmatchcase(prefix + name, pattern) for pattern in EXPECTED):
                found.expected[prefix + name] = count
            else:
                found.private[prefix + name] = count
    return found


def lies_in(tensor: Tensor, spans: Sequence[Span]) -> bool:
    """Whether a tensor begins in one of the memories."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor.numel() == 0
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        # Made of other tensors: it has no memory of its own.
        return False
    return any(first <= address < behind for first, behind in spans)
