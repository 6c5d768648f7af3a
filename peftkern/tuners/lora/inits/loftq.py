"""LoftQ (Li et al., 2023, arXiv 2310.08659): a base weight of few values, and the adapter that
makes up for it.

The base weight becomes what 4-bit or 8-bit quantisation leaves of it (kept in its dtype), and B A
the low-rank part of what was lost. Quantised as bitsandbytes does it, and without needing it.
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
    """(bits, iterations) of ``loftq_config``. ValueError for what there is not."""
    settings: Any = config.loftq_config
    bits, steps = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    if bits not in QUANTISED:
        raise ValueError(f"Only nf4 and int8 quantization is supported, got loftq_bits={bits}")
    if steps <= 0:
        raise ValueError(f"Number of iterations must be greater than 0, got loftq_iter={steps}")
    return bits, steps


def loftq(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """Q ← quantised(W - B A), then B A ← the rank r part of W - Q, ``loftq_iter`` times."""
    bits, steps = check_settings(config)
    W = current(layer.get_base_layer().weight).to(torch.float32)
    rest = W
    for _ in range(steps):
        Q = QUANTISED[bits](rest)
        A, B = low_rank(W - Q, layer.r[adapter])
        rest = W - B @ A
    quantised = Q.to(layer.get_base_layer().weight.dtype)
    return Start(A, B, lambda _: quantised)
