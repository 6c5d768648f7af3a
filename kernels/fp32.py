"""How torch is told to multiply fp32 matrices on CUDA."""

from __future__ import annotations

import torch


def tf32() -> bool:
    """Whether products of fp32 matrices may run in TF32.

    By whatever switch: ``torch.set_float32_matmul_precision``, ``allow_tf32``, or
    ``torch.backends.fp32_precision`` and those below it, after which the first two cannot be asked
    any more (``TrainingArguments(tf32=True)`` sets it).
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
