"""Whether autocast is on for a tensor, on devices that do not know it (meta) as well."""

from __future__ import annotations

import torch
from torch import Tensor


def elsewhere(x: Tensor) -> str:
    """The device type to ask about autocast for, neither CPU nor CUDA; "" where there is none."""
    kind = x.device.type
    return kind if torch.amp.is_autocast_available(kind) else ""


def is_on(x: Tensor) -> bool:
    """Whether operations on x are under autocast."""
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else elsewhere(x)
    return bool(kind) and torch.is_autocast_enabled(kind)
