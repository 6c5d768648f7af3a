"""The device that this process computes on."""

from __future__ import annotations

import torch


def infer_device() -> str:
    """The accelerator of this process, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
