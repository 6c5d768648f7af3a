"""The packed dropout mask: int32 [M, ceil(K / 32)], bit j of word w = 1 where column 32 w + j is
kept.

A word is made whole, by one thread, without ever materialising 32 random numbers: to draw 32
independent bits that are 1 with probability q = 0.b1 b2 ... bd (binary), start from 0 and, from the
last digit to the first, combine with a fresh random word: `w = b ? (r | w) : (r & w)`. Each step
halves the probability and adds the digit, so d random words give 32 exact draws. Randomness is
Philox-4x32 at counter (word, row, call, group): a function of seed and position alone, so a
recomputed mask is the same mask whatever the launch shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Launch, cdiv, device_function
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
    """block words a program; rounds of Philox (7 pass BigCrush; 10 is the customary margin)."""

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
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # int32: the launcher bounds total
    group = tl.program_id(1)
    row = flat // WORDS
    word = flat % WORDS
    low = seed_lo.to(tl.uint32).to(tl.uint64)
    seed = ((seed_hi.to(tl.uint32).to(tl.uint64) << 32) | low) ^ tl.load(seed_ptr).to(tl.uint64)
    threshold = threshold.to(tl.int64)
    c3 = row * 0 + group
    keep = (row * 0).to(tl.uint32)
    for call in tl.static_range(DIGITS // 4):
        r0, r1, r2, r3 = tl.philox(seed, word, row, row * 0 + call, c3, ROUNDS)
        keep = _step(keep, r0, threshold, 4 * call)
        keep = _step(keep, r1, threshold, 4 * call + 1)
        keep = _step(keep, r2, threshold, 4 * call + 2)
        keep = _step(keep, r3, threshold, 4 * call + 3)
    if threshold >> DIGITS != 0:  # p = 0: probability one needs the digit before the point
        keep = keep | 0xFFFFFFFF
    left = K - word * 32  # columns of this word that exist; a shift by 32 or more is undefined
    tail = (1 << tl.minimum(tl.maximum(left, 0), 31).to(tl.uint32)) - 1
    keep = tl.where(left >= 32, keep, keep & tail.to(tl.uint32))
    tl.store(
        out + group.to(tl.int64) * total + flat, keep.to(tl.int32, bitcast=True), mask=flat < total
    )


_zeros: dict[torch.device, torch.Tensor] = {}


def _no_seed(device: torch.device) -> torch.Tensor:
    """int64 [1], zero: what a seed that is a number is combined with.

    A seed that lives on the device lets a CUDA graph draw anew at each replay. With this a number
    runs the very same kernel, which eager calls have then loaded before the first capture: none may
    be loaded during one.
    """
    zero = _zeros.get(device)
    if zero is None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # in a capture it belongs to the graph, and is zero from the first replay on
        if type(zero) is torch.Tensor and not zero.is_meta and not capturing:
            _zeros[device] = zero
    return zero


def plan_bits(
    out: torch.Tensor, K: int, p: float, seed: int | torch.Tensor, config: BitsConfig
) -> list[Launch]:
    """The launch that fills ``out`` int32 [groups, M, ceil(K / 32)]."""
    groups, M, words = out.shape
    threshold, digits = digits_of(p)
    given = isinstance(seed, torch.Tensor)
    lo, hi = (0, 0) if given else (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    lo, hi = (v - 2**32 if v >= 2**31 else v for v in (lo, hi))  # one signature: always int32
    total = M * words
    at = seed if given else _no_seed(out.device)
    args = (out, at, lo, hi, threshold, M, K, words, total)
    meta = dict(
        DIGITS=digits, ROUNDS=config.rounds, BLOCK=config.block,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [Launch(_bits_kernel, (cdiv(total, config.block), groups), args, meta)]


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
    """Packed keep mask int32 [M, ceil(K / 32)] (or [groups, M, ceil(K / 32)], independent masks,
    one launch).

    Each element is kept with probability 1 - p. ``seed`` is an int, or an int64 tensor of one
    element on the device (read by the kernel, so nothing syncs). The same (seed, p, M, K) gives the
    same mask on every launch and every device. Errors: ValueError for p outside [0, 1) or negative
    sizes; TypeError for a seed of another type.
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
    out = torch.empty((groups or 1, M, cdiv(K, 32)), dtype=torch.int32, device=device)
    checks.device(bits=out, seed=seed if isinstance(seed, torch.Tensor) else None)
    digits_of(p)
    if out.numel():
        for launch in plan_bits(out, K, p, seed, config):
            launch.run()
    return out if groups is not None else out[0]
