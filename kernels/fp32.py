"""Torch's setting for products of fp32 matrices on CUDA."""

from __future__ import annotations

import torch

asked = 0  # how often `tf32` was called, by which a plan knows whether it depends on it


def tf32() -> bool:
    """True when products of fp32 matrices may run in TF32.

    This holds for all switches: ``torch.set_float32_matmul_precision``, ``allow_tf32``, and
    ``torch.backends.fp32_precision`` with those below it. After the last one was set
    (``TrainingArguments(tf32=True)`` does it), the first two cannot be read any more.
    """
    global asked
    asked += 1
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
