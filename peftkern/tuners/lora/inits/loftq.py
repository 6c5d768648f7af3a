"""LoftQ (Li et al., 2023, arXiv 2310.08659): a quantised base weight with an adapter for the error.

The base weight becomes its value after 4-bit or 8-bit quantisation (kept in its dtype), and B A the
low-rank part of the error. The quantisation is that of bitsandbytes, which is not needed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....configs.lora import LoraConfig
from ....utils.loftq_utils import int8, low_rank, nf4
from .residual import Start, current

QUANTISED: dict[int, Callable[[Tensor], Tensor]] = {4: nf4, 8: int8}


def check_settings(config: LoraConfig) -> tuple[int, int]:
    """(bits, iterations) of ``loftq_config``; ValueError for values that are not supported."""
    settings: Any = config.loftq_config
    bits, steps = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    if bits not in QUANTISED:
        raise ValueError(f"Only nf4 and int8 quantization is supported, got loftq_bits={bits}")
    if steps <= 0:
        raise ValueError(f"Number of iterations must be greater than 0, got loftq_iter={steps}")
    return bits, steps


def loftq(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """LoftQ's start: ``loftq_iter`` times Q ← quantised(W - B A), B A ← rank-r part of W - Q."""
    bits, steps = check_settings(config)
    W = current(layer.get_base_layer().weight).to(torch.float32)
    rest = W
    for _ in range(steps):
        Q = QUANTISED[bits](rest)
        A, B = low_rank(W - Q, layer.r[adapter])
        rest = W - B @ A
    quantised = Q.to(layer.get_base_layer().weight.dtype)
    return Start(A, B, lambda _: quantised)
