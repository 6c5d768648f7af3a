"""LoftQ (Li et al., 2023, arXiv 2310.08659): a base weight of few values, and the adapter that makes up
for it.

The base weight becomes what 4-bit or 8-bit quantisation leaves of it (kept in its dtype), and B A the
low-rank part of what was lost. Quantised as bitsandbytes does it, and without needing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig
from .residual import Start, current

BLOCK = 64  # values that share a scale
# NF4: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al., 2023, arXiv 2305.14314)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4(W: Tensor) -> Tensor:
    """W rounded to NF4 in blocks of 64 consecutive values, each scaled by its largest; float32."""
    flat = W.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, device=W.device)
    middles = (codes[1:] + codes[:-1]) / 2
    nearest = codes[torch.bucketize(padded / scale.clamp(min=torch.finfo().tiny), middles)]
    return (nearest * scale).view(-1)[: flat.numel()].view(W.shape)


def int8(W: Tensor) -> Tensor:
    """W [N, K] rounded to float16 and then to 255 values a row, scaled by its largest; float32."""
    W = W.to(torch.float16).float()
    scale = W.abs().amax(1, keepdim=True)
    codes = (W * (127 / scale.clamp(min=torch.finfo().tiny))).round()
    return codes * scale / 127


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


def low_rank(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with B A the best approximation of ``residual`` [N, K] of rank r."""
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


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
