"""What every kernel file shares: interpreter-safe device helpers, the record of one launch, and
what default configs depend on. Checks of arguments: :mod:`.checks`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .fp32 import tf32

# True when this process runs kernels in Triton's CPU interpreter (TRITON_INTERPRET=1 at import).
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(fn):
    """``triton.jit`` for a helper called from kernels. Under the interpreter it stays plain Python,
    which the patched ``tl`` serves just as well, without re-patching ``tl`` on every call."""
    return fn if INTERPRET.value else triton.jit(fn)


@device_function
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; upcast in the interpreter, whose dot reads bf16 as raw integers."""
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@device_function
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even. The interpreter truncates fp32 -> bf16, so it is done on
    the bits.
    """
    if INTERPRET:
        if DTYPE == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            up = bits + 0x7FFF + ((bits >> 16) & 1)
            # nothing left below: the interpreter's cast makes the smallest normal of a denormal
            x = (tl.where(x == x, up, bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@device_function
def keep_tile(words_ptr, row, row_ok, col0, WORDS, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keep mask [BLOCK_M, BLOCK_K] (int1) of columns col0.. (a multiple of 32) out of packed words
    [M, WORDS].

    One word is loaded for 32 columns and spread in registers; columns past the last word read as
    dropped.
    """
    word = col0 // 32 + tl.arange(0, BLOCK_K // 32)
    packed = tl.load(
        words_ptr + row.to(tl.int64)[:, None] * WORDS + word[None, :],
        mask=row_ok[:, None] & (word < WORDS)[None, :],
        other=0,
    )  # [BLOCK_M, BLOCK_K / 32]
    spread = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(spread, (BLOCK_M, BLOCK_K)) != 0


class Launch(NamedTuple):
    """One kernel launch, ready to run; ``benchmarks.static`` compiles the same record without
    running it.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]  # constexprs, num_warps, num_stages

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.meta)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands multiply: as torch is told to."""
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


def rank_end(ranks: Sequence[int], block_r: int) -> int | tl.constexpr:
    """Where a kernel's loop over chunks of ranks ends: the largest rank rounded up to whole chunks.

    One chunk of one adapter: a constant, which dissolves the loop. Otherwise a number known only at
    run time, which keeps it a loop: unrolled products each take tensor memory on sm_100, and past
    512 columns the compiler emits an empty kernel.
    """
    end = cdiv(max(ranks, default=1), block_r) * block_r
    return tl.constexpr(end) if len(ranks) == 1 and end == block_r else end


def next_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(*ranks: int) -> int:
    """Columns that tiles of these ranks take together: each rounded up to a power of two, and to
    the 16 that a product needs."""
    return sum(max(16, next_pow2(r)) for r in ranks)


class Arch(NamedTuple):
    """What default configs depend on: multiprocessors, compute capability (90 for 9.0), shared
    bytes a program may have.
    """

    sms: int
    capability: int
    shared: int

    @property
    def warpgroups(self) -> bool:
        """Matrix instructions that read operands from shared memory (wgmma, tcgen05), so wide tiles
        cost no registers.
        """
        return 90 <= self.capability < 120

    @property
    def blackwell(self) -> bool:
        """tcgen05: accumulators in tensor memory, which pass through registers."""
        return 100 <= self.capability < 120


@functools.cache
def _cuda_arch(index: int) -> Arch:
    p: Any = torch.cuda.get_device_properties(index)  # its types lack the field below
    return Arch(p.multi_processor_count, 10 * p.major + p.minor, p.shared_memory_per_block_optin)


def arch_of(device: torch.device) -> Arch:
    """The device's Arch. Off CUDA: a small one on the CPU (interpreter), so that splits happen on
    small shapes.
    """
    if device.type == "cuda":
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)
    return Arch(4 if device.type == "cpu" else 132, 90, 232448)


def row_stride(t: torch.Tensor) -> int:
    """Elements from one row to the next (torch reports an arbitrary value where there is at most
    one row).
    """
    return t.stride(0) if t.shape[0] > 1 else max(t.shape[1], 1)
