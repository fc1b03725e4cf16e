"""Which file a patch's tensors come from: the broker that can read it too needs only its name."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def file_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    return None
