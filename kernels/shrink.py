"""S_i = scale_i * (mask_i X) A_iᵀ for a group of adapters that read the same X, which is read once.

X [M, K]; A_i [r_i, K]; S [M, sum r_i], with the adapters side by side in columns. For small M, K is
split: fp32 partials, then a sum in fixed order (no atomics). A may have its own dtype and is cast
to X's in the kernel. The mask is read, or drawn tile by tile and written for the backward: the pass
waits for X, so that the integer work of :mod:`.bits` takes no time of its own. The same pass can
write X in fp8 (:mod:`.fp8_rows`), undropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import checks, fp8_rows
from .bits import DRAWN, ROUNDS, Draw, draw_words, seed_of
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    device_function,
    dot,
    keep_tile,
    once,
    padded,
    precision,
    row_stride,
    spread,
)  # fmt: skip
from .flight import stages
from .fp8_rows import Fp8Rows
from .fp8_rows import write as write_fp8
from .launching import planned
from .reduce import plan_sum

LAUNCH_RANK = 128  # sum of padded ranks that a launch has in registers; for more, X is read again


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of X [block_m, block_k]; K is split into split_k parts."""

    block_m: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_k=self.split_k)


def default_config(
    M: int, K: int, ranks: Sequence[int], arch: Arch, itemsize: int = 2, masked: bool = False,
    copied: bool = False,
) -> ShrinkConfig:  # fmt: skip
    """A config with enough programs to fill the device, and enough of X on the way.

    First the blocks of rows become smaller, then K is split into parts of at least 512. Blocks with
    fewer rows than ranks would read more of A than of X, so there K is split first. With an fp8
    copy (``copied``) tiles are as wide as what shares a scale, and have eight warps for it.
    """
    held = min(LAUNCH_RANK, padded(*ranks))
    block_m = 64 if held <= 64 or arch.warpgroups else 32
    if masked and len(ranks) > 1 and arch.capability == 80:
        block_m = 32  # several draws of 64 rows spill there (Triton 3.9)

    def parts() -> int:
        return max(1, min(arch.sms // cdiv(M, block_m), K // 512))

    while (
        block_m > 16 and cdiv(M, block_m) * (parts() if block_m <= held else 1) < arch.sms * 3 // 4
    ):
        block_m //= 2
    split = parts()
    programs = cdiv(M, block_m) * split
    width = fp8_rows.WIDTH if copied else None
    block_k, num_stages = steps(block_m, held, programs, arch, itemsize, masked, width)
    large = held > 64 or block_m * block_k * itemsize >= 16384
    if arch.capability == 120 and len(ranks) > 1 and block_m == 64:
        large = True  # four warps spill there (Triton 3.9)
    return ShrinkConfig(
        block_m=block_m,
        block_k=block_k,
        split_k=split,
        num_warps=8 if large else 4,
        num_stages=num_stages,
    )


def steps(
    block_m: int, held: int, programs: int, arch: Arch, itemsize: int, masked: bool = False,
    width: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(block_k, num_stages) of a shrink whose programs have block_m rows and ``held`` ranks.

    Steps are wide where registers and shared memory allow, so that fewer stages cover the latency.
    A masked X passes through registers before its product, which takes the place of one stage.
    ``width``: block_k, where it is given, of tiles that pass through registers as well.
    """
    wide = itemsize == 2 and held <= (64 if arch.warpgroups else 32)
    wide = wide and (arch.shared > 160_000 or block_m * held <= 1024)
    most = 6
    if held > 32 and (arch.capability == 90 and block_m < 64 or arch.blackwell and block_m == 32):
        wide = False  # several adapters spill there (Triton 3.9)
        most = 12 if block_m == 32 else most  # of smaller tiles more are needed
    elif wide and held > 32 and arch.blackwell and block_m == 64:
        most = 4  # five spill there
    narrow = arch.capability == 120 and masked and itemsize == 4 and block_m * held == 1024
    block_k = width or (32 if narrow else 0)  # 64 spill there (Triton 3.9)
    block_k = block_k or ((256 if block_m * held <= 256 else 128) if wide else 64)
    beside = block_k * held * 4 + block_m * block_k // 8  # A in fp32, and mask words
    late = int((masked or width is not None) and arch.shared > 160_000)
    tile = block_m * block_k * itemsize
    return block_k, stages(arch, programs, tile, beside, most=most, late=late)


@device_function
def accumulate(
    x_row, As, words, ranks, a_r_strides, a_k_strides, row, row_ok, first, last, WORDS,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    seed=0, K=0, threshold=0, fraction=0, DIGITS: tl.constexpr = 0, ROUNDS: tl.constexpr = 0,
    q=None, q_scales=None, q_stride=0, q_scales_stride=0,
):  # fmt: skip
    """A tuple of G fp32 tiles [BLOCK_M, BLOCK_R]: (mask_i X) A_iᵀ for some rows.

    The sums are over the columns first to last of X, which are loaded once for all. With DIGITS the
    masks' words are drawn, and written to ``words``; without they are read. With ``q`` an fp8 copy
    of X is written (:mod:`.fp8_rows`).
    """
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < last  # [BLOCK_K]
        xs = tl.load(
            x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        if q is not None:
            write_fp8(xs, q, q_scales, q_stride, q_scales_stride, row, row_ok, k0)
        new = ()
        for i in tl.static_range(G):
            a = tl.load(
                As[i]
                + rank.to(tl.int64)[None, :] * a_r_strides[i]
                + k.to(tl.int64)[:, None] * a_k_strides[i],
                mask=(rank < ranks[i])[None, :] & k_ok[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            kept = xs
            if words[i] is not None:
                if DIGITS > 0:
                    word = k0 // 32 + tl.arange(0, BLOCK_K // 32)  # [BLOCK_K / 32]
                    group = tl.full((1, 1), i, tl.int32)
                    packed = draw_words(
                        seed, row, word, group, K, threshold, fraction, DIGITS, ROUNDS
                    )  # [BLOCK_M, BLOCK_K / 32]
                    tl.store(
                        words[i] + row.to(tl.int64)[:, None] * WORDS + word[None, :],
                        packed,
                        mask=row_ok[:, None] & (word < WORDS)[None, :],
                    )
                    keep = spread(once(packed), BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K]
                else:
                    keep = keep_tile(words[i], row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                kept = tl.where(keep, xs, 0.0)  # [BLOCK_M, BLOCK_K]
            new = new + (dot(kept.to(xs.dtype), cast(a, xs.dtype), acc[i], PRECISION),)
        acc = new
    return acc


@triton.jit(
    do_not_specialize=["M", *DRAWN],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def _shrink_kernel(
    x, As, words, out, ranks, columns, scales, a_r_strides, a_k_strides,
    M, K, K_PART, x_stride, out_stride, part_stride, WORDS,
    seed_ptr, seed_lo, seed_hi, threshold, fraction, q, q_scales, q_stride, q_scales_stride,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, DIGITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = row < M  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    first = part * K_PART
    seed = 0
    if DIGITS > 0:
        seed = seed_of(seed_ptr, seed_lo, seed_hi)
    acc = accumulate(
        x + row.to(tl.int64)[:, None] * x_stride, As, words, ranks, a_r_strides, a_k_strides,
        row, row_ok, first, tl.minimum(first + K_PART, K), WORDS,
        G, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        seed, K, threshold, fraction, DIGITS, ROUNDS, q, q_scales, q_stride, q_scales_stride,
    )  # fmt: skip
    out_row = out + part.to(tl.int64) * part_stride + row.to(tl.int64)[:, None] * out_stride
    for i in tl.static_range(G):
        tl.store(
            out_row + (columns[i] + rank)[None, :],
            cast(acc[i] * scales[i], out.dtype.element_ty),
            mask=row_ok[:, None] & (rank < ranks[i])[None, :],
        )


class _Part(NamedTuple):
    a: torch.Tensor
    words: torch.Tensor | None
    scale: float
    column: int


def _parts(
    As: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    scales: Sequence[float],
) -> list[list[_Part]]:
    """The adapters, cut into ranks that a launch can hold, for each launch."""
    launches: list[list[_Part]] = [[]]
    held, column = 0, 0
    for a, w, scale in zip(As, words, scales, strict=True):
        for r0 in range(0, a.shape[0], LAUNCH_RANK):
            piece = a[r0 : r0 + LAUNCH_RANK]
            taken = padded(piece.shape[0])
            if held and held + taken > LAUNCH_RANK:
                launches.append([])
                held = 0
            launches[-1].append(_Part(piece, w, scale, column))
            held += taken
            column += piece.shape[0]
    return launches


def plan_shrink(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    out: torch.Tensor,
    config: ShrinkConfig,
    draw: Draw | None = None,
    copy: Fp8Rows | None = None,
) -> list[Launch]:
    """Launches that fill ``out`` [M, sum r] (contiguous); the arguments are checked already.

    With ``draw`` they also fill the words, for ranks of which one launch makes all of S; with
    ``copy`` X in fp8.
    """
    (M, K), total = x.shape, out.shape[1]
    drawn, digits = drawn_in(draw, x.device)
    # parts are whole tiles, so that no mask word is split
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split = cdiv(K, k_part)
    target = out if split == 1 else out.new_empty((split, M, total), dtype=torch.float32)
    launches: list[Launch] = []
    for parts in _parts(As, words, scales):
        ranks = tuple(p.a.shape[0] for p in parts)
        args = (
            x, tuple(p.a for p in parts), tuple(p.words for p in parts), target,
            ranks, tuple(p.column for p in parts), tuple(float(p.scale) for p in parts),
            tuple(p.a.stride(0) for p in parts), tuple(p.a.stride(1) for p in parts),
            M, K, k_part, row_stride(x), total, M * total, cdiv(K, 32), *drawn,
            *fp8_rows.arguments(None if launches else copy),
        )  # fmt: skip
        meta = dict(
            G=len(parts), BLOCK_M=config.block_m, BLOCK_K=config.block_k,
            BLOCK_R=padded(max(ranks)), PRECISION=precision(x.dtype), DIGITS=digits, ROUNDS=ROUNDS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        launches.append(Launch(_shrink_kernel, (cdiv(M, config.block_m), split), args, meta))
    if split > 1:
        launches.append(plan_sum([(target, out)]))
    return launches


def draws(ranks: Sequence[int]) -> bool:
    """True when one launch makes all of S for these ranks, and so can draw the masks."""
    return padded(*ranks) <= LAUNCH_RANK


def drawn_in(draw: Draw | None, device: torch.device) -> tuple[tuple[Any, ...], int]:
    """(the last five arguments of a kernel that may draw, DIGITS)."""
    return ((None, 0, 0, 0, 0), 0) if draw is None else draw.arguments(device)


def masks_to_fill(
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None, draw: Draw, ranks: Sequence[int]
) -> None:
    """Check ``bits`` of a call that draws: each adapter's own words, to be written in place."""
    draw.checked()
    given = [] if bits is None or isinstance(bits, torch.Tensor) else list(bits)
    fits = all(isinstance(w, torch.Tensor) and w.is_contiguous() for w in given)
    if len(given) != len(ranks) or not fits or len({id(w) for w in given}) < len(given):
        raise ValueError(
            "draw is given, and bits are not an int32 tensor of its own for each adapter; allowed: "
            "contiguous [M, ceil(K / 32)], which are written"
        )
    if not draws(ranks):
        raise ValueError(
            f"draw is given, and As have ranks {list(ranks)}; allowed with it: {LAUNCH_RANK} "
            "together, each padded to a power of two of at least 16 (draw with dropout_bits)"
        )


@planned("scales", seeds=["draw"])
def shrink(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    scales: float | Sequence[float] = 1.0,
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    draw: Draw | None = None,
    copy: Fp8Rows | None = None,
    out_dtype: torch.dtype | None = None,
    config: ShrinkConfig | None = None,
) -> torch.Tensor:
    """S [M, sum r_i] in ``out_dtype`` (default X's).

    The columns of adapter i are scale_i * (mask_i X) A_iᵀ. x [M, K] fp16/bf16/fp32, any row stride;
    A_i [r_i, K] fp32 or x's dtype, any strides, r_i from 1 to 256; bits: packed keep masks int32
    [M, ceil(K / 32)], one for all or one (or None) for each; scale_i must include 1 / (1 - p).
    With ``draw`` bits are a tensor for each adapter, into which the launch writes the masks that it
    draws: the words of ``dropout_bits(M, K, p, seed, groups=len(As))``. ``copy``: room for X in
    fp8, which is written, undropped (:func:`.fp8_rows.empty`); K is a multiple of 128 then, and
    block_k of a config 128. Errors: TypeError or ValueError naming the argument, before any launch.
    """
    x = checks.rows("x", x)
    As = list(As)
    if not As:
        raise ValueError("As is empty; allowed: one adapter or more")
    M, K = x.shape
    checks.ranks("As", As)
    As = checks.adapters("As", As, [(None, K)] * len(As), "x has K columns", x.dtype)
    if draw is not None:
        masks_to_fill(bits, draw, [a.shape[0] for a in As])
    words = checks.masks(bits, len(As), M, K)
    factors = checks.per_adapter("scales", scales, len(As))
    checks.device(x=x, As=As, bits=words, copy=copy)
    arch = arch_of(x.device)
    fp8_rows.check("copy", copy, (M, K), arch)
    out = x.new_empty((M, sum(a.shape[0] for a in As)), dtype=out_dtype or x.dtype)
    if M == 0:
        return out
    if K == 0:
        return out.zero_()
    ranks = [a.shape[0] for a in As]
    if config is None:
        masked = any(w is not None for w in words)
        copied = copy is not None
        config = default_config(M, K, ranks, arch, x.element_size(), masked, copied)
    fp8_rows.check_width("config.block_k", config.block_k, copy)
    for launch in plan_shrink(x, As, words, factors, out, config, draw, copy):
        launch.run()
    return out
