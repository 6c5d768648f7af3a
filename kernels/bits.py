"""The packed dropout mask, int32 [M, ceil(K / 32)]: bit j of word w is 1 to keep column 32 w + j.

One thread makes a whole word, without 32 separate random numbers. It needs 32 bits that are 1 with
probability q = 0.b1 b2 ... bd + f 2^-d (binary digits, and a rest). It starts from w of ones with
probability f, else of zeros, and combines w, from the last digit to the first, with a new random
word r: `w = b ? (r | w) : (r & w)`. Each step halves the probability and adds the digit. So d = 8
random words give 32 draws at p = 0.1, with exactly that probability. Random words come from
Philox-4x32 at counter (word, row, call, group). They depend only on seed and position, so a mask
that is made again, here or by the shrink (:mod:`.shrink`), is the same for any launch shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import checks
from .common import Launch, cdiv, device_function, next_pow2, once, spread
from .kinds import halves
from .launching import planned
from .recording import keep
from .reference import digits_of, pack_bits, reference_bits, unpack_bits

__all__ = [
    "BitsConfig",
    "Draw",
    "digits_of",
    "dropout_bits",
    "pack_bits",
    "plan_bits",
    "reference_bits",
    "unpack_bits",
]


ROUNDS = 7  # of Philox: 7 pass BigCrush, 10 are usual


# arguments of a kernel that draws whose values make no other form of it
DRAWN = ("seed_lo", "seed_hi", "threshold", "fraction")


@dataclass(frozen=True)
class BitsConfig:
    """``block`` words for each program; rounds of Philox."""

    block: int = 1024
    rounds: int = ROUNDS
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        checks.blocks(self, block=self.block)
        if not 7 <= self.rounds <= 10:
            raise ValueError(f"BitsConfig.rounds is {self.rounds}; allowed: 7 to 10")


@device_function
def _step(keep, fresh, threshold, DIGIT: tl.constexpr):
    return tl.where((threshold >> DIGIT) & 1 != 0, fresh | keep, fresh & keep)


@device_function
def _plus(total, x, TIMES: tl.constexpr):
    """total + x * TIMES modulo 2**32."""
    return tl.add(tl.mul(x, TIMES, sanitize_overflow=False), total, sanitize_overflow=False)


@device_function
def seed_of(seed_ptr, seed_lo, seed_hi):
    """The seed, uint64: the number in two halves, combined with the one in memory."""
    low = seed_lo.to(tl.uint32).to(tl.uint64)
    return ((seed_hi.to(tl.uint32).to(tl.uint64) << 32) | low) ^ tl.load(seed_ptr).to(tl.uint64)


@device_function
def draw_words(
    seed, row, word, group, K, threshold, fraction, DIGITS: tl.constexpr, ROUNDS: tl.constexpr
):
    """The words, int32 [BLOCK_M, BLOCK_W], of some rows [BLOCK_M] and words of a row [BLOCK_W]."""
    rows = row[:, None] + word[None, :] * 0
    words = word[None, :] + row[:, None] * 0
    threshold = threshold.to(tl.int64)
    # what the columns of a word draw together, as in reference.shared_draw
    drawn = _plus(0, seed.to(tl.uint32), 0xC2B2AE35)
    drawn = _plus(drawn, (seed >> 32).to(tl.uint32), 0x27D4EB2F)
    drawn = _plus(drawn, group.to(tl.uint32), 0x165667B1)
    drawn = _plus(drawn, rows.to(tl.uint32), 0x9E3779B1)
    drawn = _plus(drawn, words.to(tl.uint32), 0x85EBCA6B)
    keep = tl.where((drawn >> 1).to(tl.int32) < fraction, 0xFFFFFFFF, 0).to(tl.uint32)
    for call in tl.static_range(DIGITS // 4):
        r0, r1, r2, r3 = tl.philox(seed, words, rows, rows * 0 + call, rows * 0 + group, ROUNDS)
        keep = _step(keep, r0, threshold, 4 * call)
        keep = _step(keep, r1, threshold, 4 * call + 1)
        keep = _step(keep, r2, threshold, 4 * call + 2)
        keep = _step(keep, r3, threshold, 4 * call + 3)
    if threshold >> DIGITS != 0:  # p = 0: probability 1 has a digit before the point
        keep = keep | 0xFFFFFFFF
    left = K - words * 32  # columns of this word; a shift by 32 or more is undefined
    tail = (1 << tl.minimum(tl.maximum(left, 0), 31).to(tl.uint32)) - 1
    return tl.where(left >= 32, keep, keep & tail.to(tl.uint32)).to(tl.int32, bitcast=True)


@device_function
def drawn_tile(
    words, row, row_ok, k0, WORDS, seed, K, threshold, fraction,
    DIGITS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_K] of a mask, bool; its words are drawn, and written to ``words``."""
    word = k0 // 32 + tl.arange(0, BLOCK_K // 32)  # [BLOCK_K / 32]
    group = tl.full((1, 1), 0, tl.int32)
    packed = draw_words(
        seed, row, word, group, K, threshold, fraction, DIGITS, ROUNDS
    )  # [BLOCK_M, BLOCK_K / 32]
    tl.store(
        words + row.to(tl.int64)[:, None] * WORDS + word[None, :],
        packed,
        mask=row_ok[:, None] & (word < WORDS)[None, :],
    )
    return spread(once(packed), BLOCK_M, BLOCK_K)


@triton.jit(
    do_not_specialize=["M", *DRAWN],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def _bits_kernel(
    out, seed_ptr, seed_lo, seed_hi, threshold, fraction, M, K, WORDS,
    DIGITS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    group = tl.program_id(2)
    seed = seed_of(seed_ptr, seed_lo, seed_hi)
    keep = draw_words(seed, row, word, group, K, threshold, fraction, DIGITS, ROUNDS)
    at = group.to(tl.int64) * M + row.to(tl.int64)  # [BLOCK_M]
    ok = (row < M)[:, None] & (word < WORDS)[None, :]  # [BLOCK_M, BLOCK_W]
    tl.store(out + at[:, None] * WORDS + word[None, :], keep, mask=ok)


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


class Draw(NamedTuple):
    """What a mask is drawn from: the probability to drop, and the seed.

    The seed is an int, or an int64 tensor of one element on the device (which a kernel reads,
    without a sync). Masks of a group are drawn from one seed, each as its number in the group.
    """

    p: float
    seed: int | torch.Tensor

    def checked(self) -> Draw:
        """Itself; ValueError for p outside [0, 1), TypeError for a seed of another type."""
        digits_of(self.p)
        if isinstance(self.seed, torch.Tensor):
            if self.seed.dtype != torch.int64 or self.seed.numel() != 1:
                raise TypeError(
                    f"seed is {self.seed.dtype} {tuple(self.seed.shape)}; "
                    "allowed: torch.int64 with one element"
                )
        elif not isinstance(self.seed, int):
            raise TypeError(
                f"seed is {type(self.seed).__name__}; allowed: int or an int64 tensor of one "
                "element"
            )
        return self

    def arguments(self, device: torch.device) -> tuple[tuple[object, ...], int]:
        """((seed_ptr, seed_lo, seed_hi, threshold, fraction) of a kernel, DIGITS)."""
        threshold, digits, fraction = digits_of(self.p)
        if isinstance(self.seed, torch.Tensor):
            return (self.seed, 0, 0, threshold, fraction), digits
        return (_no_seed(device), *halves(self.seed), threshold, fraction), digits


def plan_bits(
    out: torch.Tensor, K: int, p: float, seed: int | torch.Tensor, config: BitsConfig
) -> list[Launch]:
    """The launch that fills ``out`` int32 [groups, M, ceil(K / 32)], or one mask [M, ...]."""
    groups, (M, words) = out.shape[:-2].numel(), out.shape[-2:]
    drawn, digits = Draw(p, seed).arguments(out.device)
    block_w = min(config.block, 128, next_pow2(words))
    block_m = config.block // block_w
    args = (out, *drawn, M, K, words)
    meta = dict(
        DIGITS=digits, ROUNDS=config.rounds, BLOCK_M=block_m, BLOCK_W=block_w,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (cdiv(M, block_m), cdiv(words, block_w), groups)
    return [Launch(_bits_kernel, grid, args, meta)]


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
    Draw(p, seed).checked()
    if M * cdiv(K, 32) > 2**31 - 2**16:
        raise ValueError(f"M, K are {M}, {K}; allowed: M * ceil(K / 32) below 2**31")
    shape = (M, cdiv(K, 32)) if groups is None else (groups, M, cdiv(K, 32))
    out = torch.empty(shape, dtype=torch.int32, device=device)
    checks.device(bits=out, seed=seed if isinstance(seed, torch.Tensor) else None)
    if out.numel():
        for launch in plan_bits(out, K, p, seed, config):
            launch.run()
    return out
