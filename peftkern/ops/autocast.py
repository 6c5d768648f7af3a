"""Queries of autocast for a tensor, which also work on devices without it (meta)."""

from __future__ import annotations

import torch
from torch import Tensor


def elsewhere(x: Tensor) -> str:
    """The type of a device other than CPU and CUDA; "" when autocast does not support it."""
    kind = x.device.type
    return kind if torch.amp.is_autocast_available(kind) else ""


def is_on(x: Tensor) -> bool:
    """True when autocast is on for operations on x."""
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else elsewhere(x)
    return bool(kind) and torch.is_autocast_enabled(kind)
