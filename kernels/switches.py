"""Torch's settings for products of matrices on CUDA, as kernels follow them."""

from __future__ import annotations

import torch

asked = 0  # how often one was asked for, by which a plan knows whether it depends on them


def tf32() -> bool:
    """True when products of fp32 matrices may run in TF32.

    This holds for all switches: ``torch.set_float32_matmul_precision``, ``allow_tf32``, and
    ``torch.backends.fp32_precision`` with those below it. After the last one was set
    (``TrainingArguments(tf32=True)`` does it), the first two cannot be read any more.
    """
    global asked
    asked += 1
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def short_sums() -> bool:
    """True when parts of a bf16 product may be kept in 16 bits until they are added.

    It is ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``, which torch has on.
    """
    global asked
    asked += 1
    return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


def settings() -> tuple[bool, bool]:
    """All of them, on which a plan that asked for one depends."""
    return tf32(), short_sums()
