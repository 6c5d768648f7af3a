"""Products with 4-bit weights by bitsandbytes' own kernel for CPUs with AVX512-BF16.

The kernel reads the bytes in the order of :mod:`.bnb4_cpu`, into which bitsandbytes brings a weight
in place, with rounding, and not always back. Here the weight stays as it is, and a second packing
stands beside it: as many bytes again, as long as the layer is in eval mode. It is used only where
bitsandbytes itself would use the kernel, and its numbers are the kernel's: x, the scales and the
result in bfloat16.

Each use asks whether the second packing is still that of the weight. Objects, addresses and
versions are compared, and some words of the packed bytes as they were; in uses of more than one
row, and in each :data:`EVERY`-th of one, also sums over all packed bytes and all statistics. So a
write through ``.data``, which moves no version, is seen at once where it changes most of a weight,
and with the next prompt or after so many tokens where it changes a part. A change that leaves the
sum of each 256 bytes (taken 8 at a time) as it was is not seen. ``PEFTKERN_BNB_COPIES=0`` in the
environment does without the second packing.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ...utils.private import bnb4_gemv, dispatch_depth
from . import bnb4_cpu

EVERY = 64  # so many calls of one row, after one another, compare some words alone
_WORDS = 64  # of 8 bytes
_wanted = os.environ.get("PEFTKERN_BNB_COPIES", "1") != "0"


class _Copy:
    """The second packing of one weight, and what it was made from."""

    def __init__(self, weight: Any) -> None:
        N, K = weight.shape
        # a weight knows its layer, by which copies are found: held, it would keep both for good
        self.weight = ref(weight.weight)
        self.held, self.facts = weight.tensors[1:], _facts(weight)  # held, they keep their ids
        self.sums = _sums(weight.bits)
        self.statistics = [_words(t).clone() for t in weight.tensors[1:]]
        words = weight.bits.view(-1).view(torch.int64)
        # a view: as long as it lives no other weight gets the same address
        self.watched = words[:: max(1, words.numel() // _WORDS)]
        self.seen, self.left = self.watched.clone(), EVERY
        scales = weight.absmax().view(N, K // weight.state.blocksize)
        self.scales = scales.t().to(torch.bfloat16).contiguous()
        self.bits = bnb4_cpu.repack(weight.bits, N, K)

    def is_of(self, weight: Any, rows: int) -> bool:
        if self.weight() is not weight.weight or _facts(weight) != self.facts:
            return False
        self.left -= 1
        if rows == 1 and self.left > 0:
            return torch.equal(self.watched, self.seen)
        self.left = EVERY
        for a, b in zip(self.statistics, weight.tensors[1:], strict=True):
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
    return (
        "" if copy is None else f", packed a second time for eval mode ({copy.bits.nbytes} bytes)"
    )


def applies(weight: Any, x: Tensor) -> bool:
    """True for a weight and rows [M, K] that bitsandbytes would give to its kernel."""
    module, state = weight.module, weight.state
    N, K = weight.shape
    return bool(
        x.shape[0]
        and x.is_cpu
        and not module.training
        and getattr(module, "support_avx512bf16_for_cpu", False)
        and N % bnb4_cpu.ROWS == 0
        and K % state.blocksize == 0
        and x.dtype != torch.float64
        and _kernel_is_known(state.quant_type)
    )


def product(weight: Any, x: Tensor) -> Tensor | None:
    """x Wᵀ [M, N] for x [M, K]; None where :func:`applies` or the user says no."""
    if not _wanted or weight.turned or not applies(weight, x) or weight.bits.storage_offset():
        return None
    copy = _copies.get(weight.module)
    if copy is None or not copy.is_of(weight, x.shape[0]):
        copy = _copies[weight.module] = _Copy(weight)
    return kernel(x, copy.bits, copy.scales, weight.state)


def kernel(x: Tensor, bits: Tensor, scales: Tensor, state: Any) -> Tensor:
    """x Wᵀ [M, N] by bitsandbytes' kernel, for repacked bits and scales."""
    call = None
    if x.__class__ is Tensor and bits.dtype is torch.uint8 and scales.dtype is torch.bfloat16:
        call = _behind_the_operator(state.quant_type)
    if call is None or dispatch_depth() or not (bits.is_contiguous() and scales.is_contiguous()):
        return _operator(x, bits, scales, state.shape, state.code, state.blocksize)
    return _called(call, x, bits, scales, state.shape[0], state.blocksize)


def _operator(
    x: Tensor, bits: Tensor, scales: Tensor, shape: Any, code: Tensor, blocksize: int
) -> Tensor:
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x.contiguous(), bits, shape, scales, code, blocksize
    )
    return y


def _called(call: Any, x: Tensor, bits: Tensor, scales: Tensor, N: int, blocksize: int) -> Tensor:
    M, K = x.shape
    narrow = x.to(torch.bfloat16).contiguous()
    y = torch.empty((M, N), dtype=torch.bfloat16)
    addresses = narrow.data_ptr(), bits.data_ptr(), scales.data_ptr(), y.data_ptr()
    call(M, N, K, *addresses, blocksize, K, N)
    return y.to(x.dtype)


def _facts(weight: Any) -> tuple[Any, ...]:
    """What changes with the weight, but for writes through ``.data`` and its like."""
    state, held = weight.state, (weight.bits, *weight.tensors[1:])
    versions = [None if t.is_inference() else t._version for t in held]
    objects = [*map(id, held[1:])]
    return objects, versions, held[0].data_ptr(), state.blocksize, state.quant_type, state.shape


def _words(t: Tensor) -> Tensor:
    """Bytes as numbers of 8 where they divide, which compares in less time."""
    whole = t.numel() % 8 == 0 and t.storage_offset() % 8 == 0
    if t.dtype == torch.uint8 and whole and t.is_contiguous():
        return t.view(-1).view(torch.int64)
    return t


def _sums(bits: Tensor) -> Tensor:
    """One number for each 256 bytes in a row, the sum of them taken 8 at a time."""
    return bits.view(-1).view(torch.int64).view(-1, 32).sum(1)


class _Question(NamedTuple):
    """A weight of one block, and rows x of which each picks a column."""

    x: Tensor
    bits: Tensor  # repacked
    scales: Tensor
    shape: tuple[int, int]
    code: Tensor
    want: Tensor  # x Wᵀ

    @classmethod
    def of(cls, kind: str) -> _Question:
        with torch.device("cpu"):  # whatever the default device
            bits = torch.arange(bnb4_cpu.ROWS * 32).mul_(37).to(torch.uint8)
            N, K = shape = (bnb4_cpu.ROWS, 64)
            dequantise = torch.ops.bitsandbytes.dequantize_4bit.default
            w = dequantise(bits, torch.ones(N), K, kind, shape, torch.float32)
            # kinds are told by the sign
            code = torch.tensor([0.0, 1.0 if kind == "fp4" else -1.0])
            x = torch.eye(K)[[0, 1, 30, 63]]
            scales = torch.ones((1, N), dtype=torch.bfloat16)
            return cls(x, bnb4_cpu.repack(bits, N, K), scales, shape, code, x @ w.t())


@cache
def _kernel_is_known(kind: str) -> bool:
    """True when bitsandbytes has the kernel here, and it reads this order of bytes."""
    q = _Question.of(kind)
    try:
        y = _operator(q.x, q.bits, q.scales, q.shape, q.code, q.shape[1])
    except Exception:  # another version's operator: then there is no such kernel
        return False
    return torch.allclose(y, q.want, rtol=2.0**-6, atol=1e-6)


@cache
def _behind_the_operator(kind: str) -> Any:
    """The library's own function, where it is known and gives the operator's numbers; or None."""
    call = bnb4_gemv().get(kind)
    if call is None or not _kernel_is_known(kind):
        return None
    q = _Question.of(kind)
    y = _called(call, q.x, q.bits, q.scales, *q.shape)
    return call if torch.equal(y, _operator(*q[:5], q.shape[1])) else None
