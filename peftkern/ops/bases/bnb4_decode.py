"""Products of a few rows with 4-bit weights by bitsandbytes' own kernel for CPUs with AVX512-BF16.

The kernel reads the bytes in the order of :mod:`.bnb4_cpu`, into which bitsandbytes brings a weight
in place, with rounding, and not always back. Here the weight stays as it is, and a second packing
stands beside it: as many bytes again, as long as the layer is in eval mode. It is used only where
bitsandbytes itself would use the kernel, and its numbers are the kernel's: x, the scales and the
result in bfloat16.

The second packing does not go stale. Each use compares the weight's object, address and version,
the statistics number by number, and a sum for each 256 of the packed bytes, as a write through
``.data`` shows in nothing else. ``PEFTKERN_BNB_COPIES=0`` in the environment does without it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import bnb4_cpu

ROWS = 8  # with more, dequantising and torch's product take less time
_wanted = os.environ.get("PEFTKERN_BNB_COPIES", "1") != "0"


class _Copy:
    """The second packing of one weight, and what it was made from."""

    def __init__(self, weight: Any) -> None:
        N, K = weight.shape
        self.weight, self.versions = weight.weight, _versions(weight)
        self.sums = _sums(weight.bits)
        self.statistics = [_words(t).clone() for t in weight.tensors[1:]]
        scales = weight.absmax().view(N, K // weight.state.blocksize)
        self.scales = scales.t().to(torch.bfloat16).contiguous()
        self.bits = bnb4_cpu.repack(weight.bits, N, K)

    def is_of(self, weight: Any) -> bool:
        held = weight.tensors
        if weight.weight is not self.weight or len(held) != len(self.statistics) + 1:
            return False
        if _versions(weight) != self.versions:
            return False
        for a, b in zip(self.statistics, held[1:], strict=True):
            if not torch.equal(a, _words(b)):
                return False
        return torch.equal(self.sums, _sums(weight.bits))


_copies: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Free the second packing of a layer, if there is one."""
    if _copies:
        _copies.pop(module, None)


def describe(module: nn.Module) -> str:
    """Words for ``explain`` on a layer's second packing; none without one."""
    copy = _copies.get(module)
    return "" if copy is None else f", packed a second time for decoding ({copy.bits.nbytes} bytes)"


def applies(weight: Any, x: Tensor) -> bool:
    """True for a weight and few rows [M, K] that bitsandbytes would give to its kernel."""
    module, state = weight.module, weight.state
    N, K = weight.shape
    return bool(
        0 < x.shape[0] <= ROWS
        and x.is_cpu
        and not module.training
        and getattr(module, "support_avx512bf16_for_cpu", False)
        and N % bnb4_cpu.ROWS == 0
        and K % state.blocksize == 0
        and x.dtype != torch.float64
        and _kernel_is_known(state.quant_type)
    )


def product(weight: Any, x: Tensor) -> Tensor | None:
    """x Wᵀ [M, N] for few rows of x [M, K]; None where :func:`applies` or the user says no."""
    if not _wanted or weight.turned or not applies(weight, x) or weight.bits.storage_offset():
        return None
    copy = _copies.get(weight.module)
    if copy is None or not copy.is_of(weight):
        copy = _copies[weight.module] = _Copy(weight)
    return kernel(x, copy.bits, copy.scales, weight.state)


def kernel(x: Tensor, bits: Tensor, scales: Tensor, state: Any) -> Tensor:
    """x Wᵀ [M, N] by bitsandbytes' kernel, for repacked bits and scales."""
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x.contiguous(), bits, state.shape, scales, state.code, state.blocksize
    )
    return y


def _versions(weight: Any) -> tuple[Any, ...]:
    bits, state = weight.bits, weight.state
    version = None if bits.is_inference() else bits._version
    return bits.data_ptr(), version, state.blocksize, state.quant_type, state.shape


def _words(t: Tensor) -> Tensor:
    """Bytes as numbers of 8 where they divide, which compares in a fifth of the time."""
    whole = t.numel() % 8 == 0 and t.storage_offset() % 8 == 0
    if t.dtype == torch.uint8 and whole and t.is_contiguous():
        return t.view(-1).view(torch.int64)
    return t


def _sums(bits: Tensor) -> Tensor:
    """One number for each 256 bytes in a row, the sum of them taken 8 at a time."""
    return bits.view(-1).view(torch.int64).view(-1, 32).sum(1)


@cache
def _kernel_is_known(kind: str) -> bool:
    """True when bitsandbytes has the kernel here, and it reads this order of bytes.

    The question is asked with a weight of one block, of which each row of x picks a column.
    """
    ops = torch.ops.bitsandbytes
    bits = torch.arange(bnb4_cpu.ROWS * 32).mul_(37).to(torch.uint8)
    N, K = shape = (bnb4_cpu.ROWS, 64)
    w = ops.dequantize_4bit.default(bits, torch.ones(N), K, kind, shape, torch.float32)
    code = torch.tensor([0.0, 1.0 if kind == "fp4" else -1.0])  # it tells the kinds by their signs
    x = torch.eye(K)[[0, 1, 30, 63]]
    scales = torch.ones((1, N), dtype=torch.bfloat16)
    try:
        y = ops.gemv_4bit.default(x, bnb4_cpu.repack(bits, N, K), shape, scales, code, K)
    except Exception:  # another version's operator: then there is no such kernel
        return False
    return torch.allclose(y, x @ w.t(), rtol=2.0**-6, atol=1e-6)
