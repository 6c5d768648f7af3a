"""The packed dropout mask, int32 [M, ceil(K / 32)]: bit j of word w is 1 to keep column 32 w + j.

One thread makes a whole word, without 32 separate random numbers. It needs 32 independent bits that
are 1 with probability q = 0.b1 b2 ... bd (binary). It starts from w = 0 and, from the last digit to
the first, combines w with a new random word r: `w = b ? (r | w) : (r & w)`. Each step halves the
probability and adds the digit, so d random words give 32 exact draws. Random words come from
Philox-4x32 at counter (word, row, call, group). They depend only on seed and position, so a mask
that is made again is the same for any launch shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Launch, cdiv, device_function
from .launching import planned
from .recording import keep
from .reference import digits_of, pack_bits, reference_bits, unpack_bits

__all__ = [
    "BitsConfig",
    "digits_of",
    "dropout_bits",
    "pack_bits",
    "plan_bits",
    "reference_bits",
    "unpack_bits",
]


@dataclass(frozen=True)
class BitsConfig:
    """``block`` words for each program; rounds of Philox (7 pass BigCrush, 10 are usual)."""

    block: int = 256
    rounds: int = 7
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        checks.blocks(self, block=self.block)
        if not 7 <= self.rounds <= 10:
            raise ValueError(f"BitsConfig.rounds is {self.rounds}; allowed: 7 to 10")


@device_function
def _step(keep, fresh, threshold, DIGIT: tl.constexpr):
    return tl.where((threshold >> DIGIT) & 1 != 0, fresh | keep, fresh & keep)


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "threshold", "M", "total"],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def _bits_kernel(
    out, seed_ptr, seed_lo, seed_hi, threshold, M, K, WORDS, total,
    DIGITS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int32, as total is limited
    group = tl.program_id(1)
    row = flat // WORDS  # [BLOCK]
    word = flat % WORDS  # [BLOCK]
    low = seed_lo.to(tl.uint32).to(tl.uint64)
    seed = ((seed_hi.to(tl.uint32).to(tl.uint64) << 32) | low) ^ tl.load(seed_ptr).to(tl.uint64)
    threshold = threshold.to(tl.int64)
    c3 = row * 0 + group
    keep = (row * 0).to(tl.uint32)  # [BLOCK]
    for call in tl.static_range(DIGITS // 4):
        r0, r1, r2, r3 = tl.philox(seed, word, row, row * 0 + call, c3, ROUNDS)  # each [BLOCK]
        keep = _step(keep, r0, threshold, 4 * call)
        keep = _step(keep, r1, threshold, 4 * call + 1)
        keep = _step(keep, r2, threshold, 4 * call + 2)
        keep = _step(keep, r3, threshold, 4 * call + 3)
    if threshold >> DIGITS != 0:  # p = 0: probability 1 has a digit before the point
        keep = keep | 0xFFFFFFFF
    left = K - word * 32  # [BLOCK], columns of this word; a shift by 32 or more is undefined
    tail = (1 << tl.minimum(tl.maximum(left, 0), 31).to(tl.uint32)) - 1  # [BLOCK]
    keep = tl.where(left >= 32, keep, keep & tail.to(tl.uint32))
    tl.store(
        out + group.to(tl.int64) * total + flat, keep.to(tl.int32, bitcast=True), mask=flat < total
    )


_zeros: dict[torch.device, torch.Tensor] = {}


def _no_seed(device: torch.device) -> torch.Tensor:
    """A zero, int64 [1], that the kernel combines with a seed that is a number.

    A seed on the device lets a CUDA graph draw a new mask at each replay. With this zero, a seed
    that is a number runs the same kernel. So eager calls load the kernel before the first capture,
    during which no kernel may be loaded.
    """
    zero = _zeros.get(device)
    if zero is None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # within a capture it belongs to the graph, and becomes zero only at the first replay
        if type(zero) is torch.Tensor and not zero.is_meta and not capturing:
            if device.type == "cuda":  # other streams read it too, and do not wait for this one
                torch.cuda.current_stream(device).synchronize()
            _zeros[device] = zero
            keep(zero, functools.partial(_no_seed, device))
    return zero


def plan_bits(
    out: torch.Tensor, K: int, p: float, seed: int | torch.Tensor, config: BitsConfig
) -> list[Launch]:
    """The launch that fills ``out`` int32 [groups, M, ceil(K / 32)]."""
    groups, M, words = out.shape
    threshold, digits = digits_of(p)
    given = isinstance(seed, torch.Tensor)
    lo, hi = (0, 0) if given else (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    lo, hi = (v - 2**32 if v >= 2**31 else v for v in (lo, hi))  # always int32: one signature
    total = M * words
    at = seed if given else _no_seed(out.device)
    args = (out, at, lo, hi, threshold, M, K, words, total)
    meta = dict(
        DIGITS=digits, ROUNDS=config.rounds, BLOCK=config.block,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [Launch(_bits_kernel, (cdiv(total, config.block), groups), args, meta)]


@planned(seeds=["seed"])
def dropout_bits(
    M: int,
    K: int,
    p: float,
    seed: int | torch.Tensor,
    *,
    groups: int | None = None,
    device: torch.device | str,
    config: BitsConfig = BitsConfig(),
) -> torch.Tensor:
    """The packed keep mask, int32 [M, ceil(K / 32)], or [groups, M, ceil(K / 32)] with ``groups``.

    The masks of groups are independent and made by one launch. Each element is kept with
    probability 1 - p. ``seed`` is an int, or an int64 tensor of one element on the device (which
    the kernel reads, without a sync). The same (seed, p, M, K) gives the same mask on every launch
    and every device. Errors: ValueError for p outside [0, 1) or negative sizes; TypeError for a
    seed of another type.
    """
    if M < 0 or K < 0:
        raise ValueError(f"M, K are {M}, {K}; allowed: 0 or more")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed is {seed.dtype} {tuple(seed.shape)}; allowed: torch.int64 with one element"
            )
    elif not isinstance(seed, int):
        raise TypeError(
            f"seed is {type(seed).__name__}; allowed: int or an int64 tensor of one element"
        )
    if M * cdiv(K, 32) > 2**31 - 2**16:
        raise ValueError(f"M, K are {M}, {K}; allowed: M * ceil(K / 32) below 2**31")
    shape = (M, cdiv(K, 32)) if groups is None else (groups, M, cdiv(K, 32))
    out = torch.empty(shape, dtype=torch.int32, device=device)
    checks.device(bits=out, seed=seed if isinstance(seed, torch.Tensor) else None)
    digits_of(p)
    if out.numel():
        for launch in plan_bits(out[None] if groups is None else out, K, p, seed, config):
            launch.run()
    return out
