"""The parts that kernel files share: device helpers, the record of a launch, data of a device.

The device helpers also work in Triton's interpreter. Checks of arguments are in :mod:`.checks`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .recording import start
from .switches import short_sums, tf32

# True when this process runs kernels in Triton's CPU interpreter (TRITON_INTERPRET=1 at import).
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(fn):
    """``triton.jit`` for a helper that kernels call; in the interpreter, the function itself.

    There the patched ``tl`` works in plain Python too, and is not patched again at every call.
    """
    return fn if INTERPRET.value else triton.jit(fn)


@device_function
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] + a [M, K] @ b [K, N] in fp32.

    The interpreter gets fp32 operands, as its dot reads bf16 as raw integers.
    """
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@device_function
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even.

    The interpreter would truncate fp32 to bf16, so there the rounding is done on the bits.
    """
    if INTERPRET:
        if DTYPE == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            up = bits + 0x7FFF + ((bits >> 16) & 1)
            # low bits are cleared too, as the interpreter's cast turns denormals into normals
            x = (tl.where(x == x, up, bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@device_function
def keep_tile(words_ptr, row, row_ok, col0, WORDS, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keep mask, int1 [BLOCK_M, BLOCK_K], of the columns from col0 (a multiple of 32) on.

    ``words_ptr`` has the packed words [M, WORDS]. One word is loaded for 32 columns and spread in
    registers; columns after the last word count as dropped.
    """
    word = col0 // 32 + tl.arange(0, BLOCK_K // 32)  # [BLOCK_K / 32]
    packed = tl.load(
        words_ptr + row.to(tl.int64)[:, None] * WORDS + word[None, :],
        mask=row_ok[:, None] & (word < WORDS)[None, :],
        other=0,
    )  # [BLOCK_M, BLOCK_K / 32]
    return spread(packed, BLOCK_M, BLOCK_K)


@device_function
def spread(packed, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words [BLOCK_M, BLOCK_K / 32] as int1 [BLOCK_M, BLOCK_K], a column for each bit."""
    each = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(each, (BLOCK_M, BLOCK_K)) != 0


@device_function
def add_low_rank(
    acc, Ls, Rs, words, ranks, l_strides, r_strides, n_strides, row, col, row_ok, col_ok, n0,
    WORDS, RANK_END,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + sum over i of mask_i * (L_i R_i)."""
    row64, col64 = row.to(tl.int64), col.to(tl.int64)  # [BLOCK_M], [BLOCK_N]
    for i in tl.static_range(len(Ls)):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if words[i] is not None else acc
        for r0 in tl.range(0, RANK_END, BLOCK_R, num_stages=1):
            rank = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
            rank_ok = rank < ranks[i]  # [BLOCK_R]
            left = tl.load(
                Ls[i] + row64[:, None] * l_strides[i] + rank[None, :],
                mask=row_ok[:, None] & rank_ok[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            right = tl.load(
                Rs[i] + rank.to(tl.int64)[:, None] * r_strides[i] + col64[None, :] * n_strides[i],
                mask=rank_ok[:, None] & col_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_N]
            part = dot(left, cast(right, left.dtype), part, PRECISION)
        if words[i] is not None:
            keep = keep_tile(words[i], row, row_ok, n0, WORDS, BLOCK_M, BLOCK_N)
            part = acc + tl.where(keep, part, 0.0)
        acc = part
    return acc


@device_function
def once(x):
    """x [M, N], computed once and then moved to the threads that need it.

    The compiler may have each of these compute it again, as it takes arithmetic to be cheaper than
    a way through shared memory; for random words of a mask it is not. Through a reduction, here of
    one element, it does not look.
    """
    return tl.max(x[None, :, :], axis=0)


class Launch(NamedTuple):
    """One kernel launch, ready to run; ``benchmarks.static`` compiles the same record only."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]  # constexprs, num_warps, num_stages

    def run(self) -> None:
        start(self)


def precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of products: "tf32" for fp32 if torch allows it, else "ieee"."""
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


def parts_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parts of a product in ``dtype`` that are added later: fp32, or fp16 for bf16.

    fp16 keeps 11 digits where bf16's result keeps 8, and has a scale for each row of a tile.
    """
    return torch.float16 if dtype == torch.bfloat16 and short_sums() else torch.float32


def rank_end(ranks: Sequence[int], block_r: int) -> int | tl.constexpr:
    """The end of a kernel's loop over chunks of ranks: the largest rank rounded up to whole chunks.

    For one chunk of one adapter it is a constant, which removes the loop. Otherwise it is known
    only at run time, which keeps the loop: unrolled products take tensor memory each on sm_100, and
    above 512 columns the compiler emits an empty kernel.
    """
    end = cdiv(max(ranks, default=1), block_r) * block_r
    return tl.constexpr(end) if len(ranks) == 1 and end == block_r else end


def next_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(*ranks: int) -> int:
    """The sum of the ranks, each rounded up to a power of two of at least 16.

    Tiles of these ranks take so many columns; a product needs at least 16.
    """
    return sum(max(16, next_pow2(r)) for r in ranks)


class Arch(NamedTuple):
    """The data of a device on which default configs depend.

    Number of multiprocessors, compute capability (90 for 9.0), bytes of shared memory that a
    program may use.
    """

    sms: int
    capability: int
    shared: int

    @property
    def warpgroups(self) -> bool:
        """True for matrix instructions that read operands from shared memory (wgmma, tcgen05).

        Wide tiles then need no registers.
        """
        return 90 <= self.capability < 120

    @property
    def blackwell(self) -> bool:
        """True for tcgen05, whose accumulators are in tensor memory and pass through registers."""
        return 100 <= self.capability < 120


@functools.cache
def _cuda_arch(index: int) -> Arch:
    p: Any = torch.cuda.get_device_properties(index)  # its types lack the field below
    return Arch(p.multi_processor_count, 10 * p.major + p.minor, p.shared_memory_per_block_optin)


def arch_of(device: torch.device) -> Arch:
    """The device's Arch.

    The CPU (interpreter) has a small one, so that small shapes are split too.
    """
    if device.type == "cuda":
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)
    return Arch(4 if device.type == "cpu" else 132, 90, 232448)


def starts_early(x: torch.Tensor, arch: Arch) -> bool:
    """True where a launch may start before the one ahead of it ends; never in the interpreter."""
    runs_interpreted = INTERPRET.value and not x.is_meta
    return arch.capability >= 90 and torch.version.hip is None and not runs_interpreted


def row_stride(t: torch.Tensor) -> int:
    """The number of elements from one row to the next.

    (For fewer than two rows torch's stride is an arbitrary number.)
    """
    return t.stride(0) if t.shape[0] > 1 else max(t.shape[1], 1)
