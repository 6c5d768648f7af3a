"""x times an int8 matrix in integers, for x in float32 on a CPU: each element as four digits.

    n = x · 2^(30 - e) without its fraction, 2^e above the row's largest |x|
    n = Σ_i 256^i d_i, |d_i| <= 128
    x q = 2^(e - 30) Σ_i 256^i (d_i q)        d_i q exact, in int32

So x keeps 30 bits below its row's largest element and only the last sum rounds: the error is below
that of a product in float32. On an AMD EPYC with AVX512-VNNI a product of integers takes an eighth
of the time of one in float32, so that four of them take half; and q is read as it is, without a
copy in float32.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ...utils.private import integer_product, is_grad_batch, transforms_active

_BITS = 30  # two fewer than an int32 has: one is the sign, and digits are rounded to nearest
_HALVES = 0x808080  # 128 in each of the three lower digits, so that those are from -128 to 127
_MOST_SUMMED = 2**16  # products of two digits, up to 2^14 each, that an int32 holds with room
# Where the digits cost less than they save. One row: a copy of q in float32 that caches do not hold
# is more work than four readings of q. Several rows: a q of so many elements always, a smaller one
# from so many multiplications on.
_ROW, _LARGE, _SMALL, _WORK = 2**22, 3 * 2**18, 2**17, 2**23
_FEW_ROWS = 32


@cache
def most_rows() -> float:
    """The rows of x up to which this processor gains by digits; 0 where it never does.

    By the instructions' rates four integer products take as long as one in float32. For few rows
    there is a copy of q less; with many it gains where MKL runs below that rate, as on AMD's.
    """
    ask = getattr(torch.cpu, "get_capabilities", None)  # not in torch 2.11
    found = {} if ask is None else ask()
    if integer_product is None or not found.get("avx512_vnni"):
        return 0
    return math.inf if "AMD" in str(found.get("cpu_name")) else _FEW_ROWS


def gains(rows: int, elements: int) -> bool:
    """True where a product of so many rows with a q of so many elements is faster in digits."""
    if rows == 1:
        return elements >= _ROW and most_rows() > 0
    large = elements >= _LARGE or (elements >= _SMALL and rows * elements >= _WORK)
    return large and rows <= most_rows()


def multiply(x: Tensor, q: Tensor) -> Tensor | None:
    """x q [M, C] in float32 for x [M, R] and q [R, C] int8, or None: it gains nothing, or cannot.

    It cannot when an element of x is not finite.
    """
    M, R = x.shape
    if (
        x.dtype is not torch.float32
        or q.dtype is not torch.int8
        or not x.is_cpu
        or not gains(M, q.numel())
        or R > _MOST_SUMMED
        or x.__class__ is not Tensor  # it may have no numbers, as in the two below
        or is_grad_batch(x)
        or transforms_active()
    ):
        return None
    assert integer_product is not None
    largest = x.abs().amax(1, keepdim=True)  # NaN where the row has one
    limit = largest.max().item()
    if not limit < math.inf:
        return None
    if M == 1:
        up = min(_BITS - math.frexp(limit)[1], 127)
        n = x.mul(2.0**up).to(torch.int32).add_(_halves()).bitwise_xor_(_halves())
        parts = integer_product(n.view(torch.int8).view(R, 4).t().contiguous(), q)
        sums = torch.mm(_powers(), parts.to(torch.float32))
        return sums.mul_(2.0**-up)
    ups = torch.frexp(largest).exponent.neg_().add_(_BITS).clamp_(max=127).to(torch.float32)
    n = x.mul(ups.exp2()).to(torch.int32).add_(_halves()).bitwise_xor_(_halves())
    digits = x.new_empty((4, M, R), dtype=torch.int8)
    for i in range(4):
        digits[i].copy_(n)  # the lowest byte
        if i < 3:
            n.bitwise_right_shift_(8)
    parts = integer_product(digits.view(4 * M, R), q).view(4, M, -1)
    y: Tensor = parts[3].to(torch.float32)
    for i in (2, 1, 0):
        y = torch.add(parts[i].to(torch.float32), y, alpha=256.0)
    return y.mul_(ups.neg_().exp2_())


@cache
def _halves() -> Tensor:
    with torch.inference_mode(False):  # calls in and out of inference mode read it
        return torch.tensor(_HALVES, dtype=torch.int32)


@cache
def _powers() -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([[1.0, 2.0**8, 2.0**16, 2.0**24]])
