"""Prefix attention for few query rows over many keys: split over the keys, then merged.

The query heads of one key/value head, and the few rows of each, are the rows of one tile. For a
shared prefix a tile has these rows of the whole batch: the prefix is read once and not B times.
Both sources run in one launch. Each program reads one stretch of keys of one source and writes O
and LSE of this stretch in fp32; a second launch merges them in fixed order. From compute capability
9.0 on the second one is started while the first one runs, and waits for its end before it reads
anything. The first one is an ordinary launch, which starts after all earlier work of its stream.

q_offset may be a device tensor: keys after it cost no time, the host does not wait for it, and the
launches do not depend on it, so that a CUDA graph over a StaticCache can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    device_function,
    next_pow2,
    starts_early,
)
from .launching import planned
from .prefix_attention import attend, key_range, walk
from .prefix_tile import (
    Problem,
    check,
    from_natural,
    logarithm,
    power,
    store_tile,
    strides,
    tile,
    to_natural,
)

FEW_ROWS = 64  # largest number of query rows of a key/value head for which splitting keys is faster
LEAST_KEYS = 128  # smallest number of keys of a split
_MERGED = 2048  # elements of the parts of a row that one warp loads at a time


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of tiles and numbers of stretches.

    ``block_m``: rows of a tile over own keys; ``block_r``: rows of a tile over the prefix (of the
    whole batch, for a shared prefix); ``block_n``: keys of a block; ``splits``, ``prefix_splits``:
    number of stretches of own keys and of the prefix.
    """

    block_m: int = 16
    block_r: int = 16
    block_n: int = 64
    splits: int = 1
    prefix_splits: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_r=self.block_r, block_n=self.block_n)
        for name, value in (("splits", self.splits), ("prefix_splits", self.prefix_splits)):
            if value < 1:
                raise ValueError(f"DecodeConfig.{name} is {value}; allowed: 1 or more")


def few_rows(T: int, group: int) -> bool:
    """True when T query rows, with ``group`` heads for a key/value head, are few enough."""
    return T * group <= FEW_ROWS and T <= 16


def default_config(
    sizes: tuple[int, int, int, int, int, int, int], shared: bool, arch: Arch, itemsize: int = 2
) -> DecodeConfig:
    """A config for ``sizes`` (B, H, H_kv, T, S, P, D), for one wave of programs.

    The prefix has shorter stretches than the own keys, as its programs are few, with more rows.
    """
    B, H, H_kv, T, S, P, D = sizes
    rows = H // max(H_kv, 1) * T
    widest = 32 if D <= 128 and itemsize == 2 else 16  # most rows for which accumulators fit
    block_m = min(widest, max(16, next_pow2(rows)))
    packed = min(widest, max(16, next_pow2(rows * B))) if shared else block_m
    num_warps = 4 if D <= 128 else 8 if itemsize == 2 else 16  # fp32 of fewer spill (Triton 3.9)
    programs = B * H_kv * cdiv(rows, block_m)
    prefix_splits = max(1, min(16, cdiv(P, LEAST_KEYS // 2)))
    prefixes = (cdiv(rows * B, packed) if shared else B * cdiv(rows, packed)) * H_kv * prefix_splits
    # a multiprocessor has room for one program of eight warps or more, or for two of four
    slots = arch.sms * (2 if num_warps == 4 else 1)
    splits = max(1, min((slots - prefixes) // max(programs, 1), S // LEAST_KEYS))
    return DecodeConfig(
        block_m=block_m,
        block_r=packed,
        block_n=32 if itemsize == 2 else 16,
        splits=splits,
        prefix_splits=prefix_splits,
        num_warps=num_warps,
        num_stages=3 if itemsize == 2 else 1,
    )


@device_function
def stretch(
    q, k_base, v_base, k_stride, v_stride, keep, no_prefix, q_offset_at, part_o, part_lse,
    q_strides, unit, block, hk, n0, n_end, count, shift, split,
    q_offset, offset_stride, window, scale, softcap, B, H, G, T, U,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write O and LSE of one tile of rows over the keys n0 to n_end of one source.

    The rows of key/value head hk are numbered over batch, head of the group and row. A unit of U
    rows (those of one row of the batch, or all) has the same keys.
    """
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = r < U  # [BLOCK_M]
    flat = unit * U + r  # [BLOCK_M]
    b = flat // (G * T)  # [BLOCK_M]
    h = hk * G + flat % (G * T) // T  # [BLOCK_M]
    t = flat % T  # [BLOCK_M]
    b = tl.where(row_ok, b, 0)
    if q_offset_at is None:
        query = q_offset + t  # [BLOCK_M]
    else:
        query = t + tl.load(q_offset_at + b * offset_stride).to(tl.int32)  # [BLOCK_M]
    low = tl.min(tl.where(row_ok, query, 2147483647), 0)
    high = tl.max(tl.where(row_ok, query, -2147483648), 0)
    first, last = key_range(low, high, count, shift, window, BLOCK_N, CAUSAL, WINDOW)
    sees = row_ok
    if no_prefix is not None:
        sees = sees & (tl.load(no_prefix + b) == 0)  # [BLOCK_M]
    row = b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]  # [BLOCK_M]
    row += t.to(tl.int64) * q_strides[2]
    rows = tile(q, row, row_ok, 1, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    top, total, acc = walk(
        rows, k_base, v_base, k_stride, v_stride, keep,
        tl.maximum(first, n0), tl.minimum(last, n_end), shift, query, sees, window,
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.full((BLOCK_M,), 0.0, tl.float32),
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32), scale, softcap,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, NATURAL,
        PRECISION,
    )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)
    out = (split * B + b.to(tl.int64)) * H * T + h * T + t  # [BLOCK_M], rows of [splits, B, H, T]
    store_tile(part_o, out, row_ok, D, acc / total[:, None], D, BLOCK_D)
    tl.store(part_lse + out, top + logarithm(total, NATURAL), mask=row_ok)


# fmt: off
@triton.jit(do_not_specialize=[
    "q_offset", "T", "S", "P", "PROGRAMS_P", "BLOCKS_P", "SPLITS_P", "PART_P", "BLOCKS_S",
    "SPLITS_S", "PART_S", "B", "keep_stride",
])
# fmt: on
def _decode_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, q_offset_at, part_o, part_lse,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, keep_stride,
    q_offset, offset_stride, window, scale, softcap, B, H, H_KV, T, S, P,
    PROGRAMS_P, BLOCKS_P, SPLITS_P, PART_P, BLOCKS_S, SPLITS_S, PART_S,
    SHARED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # programs of the merge may start where there is room, and wait for this grid's end
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    G = H // H_KV
    if program < PROGRAMS_P:  # the prefix first, as its programs have the most rows
        block = program % BLOCKS_P
        split = program // BLOCKS_P % SPLITS_P
        hk = (program // (BLOCKS_P * SPLITS_P) % H_KV).to(tl.int64)
        unit = (program // (BLOCKS_P * SPLITS_P * H_KV)).to(tl.int64)
        U = G * T
        if SHARED:
            U = B * G * T
        n0 = split * PART_P
        stretch(
            q, prefix_key + unit * pk_strides[0] + hk * pk_strides[1],
            prefix_value + unit * pv_strides[0] + hk * pv_strides[1], pk_strides[2], pv_strides[2],
            None, no_prefix, q_offset_at, part_o, part_lse, q_strides, unit, block, hk,
            n0, n0 + PART_P, P, P, SPLITS_S + split, q_offset, offset_stride, window, scale,
            softcap, B, H, G, T, U,
            D, BLOCK_D, BLOCK_R, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, NATURAL,
            PRECISION,
        )  # fmt: skip
    else:
        program -= PROGRAMS_P
        block = program % BLOCKS_S
        split = program // BLOCKS_S % SPLITS_S
        hk = (program // (BLOCKS_S * SPLITS_S) % H_KV).to(tl.int64)
        unit = (program // (BLOCKS_S * SPLITS_S * H_KV)).to(tl.int64)
        own_keep = None
        if keep is not None:
            own_keep = keep + unit * keep_stride
        n0 = split * PART_S
        stretch(
            q, k + unit * k_strides[0] + hk * k_strides[1],
            v + unit * v_strides[0] + hk * v_strides[1], k_strides[2], v_strides[2],
            own_keep, None, q_offset_at, part_o, part_lse, q_strides, unit, block, hk,
            n0, n0 + PART_S, S, 0, split, q_offset, offset_stride, window, scale,
            softcap, B, H, G, T, G * T,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, NATURAL,
            PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "ROWS", "SPLITS", "SPLIT_END"])
def _merge_kernel(
    part_o, part_lse, sinks, o, lse, o_strides, H, T, ROWS, SPLITS, SPLIT_END,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    NATURAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)  # one of B * H * T
    h = row // T % H
    i = tl.arange(0, BLOCK_SPLITS)  # [BLOCK_SPLITS]
    parts = tl.load(part_lse + i * ROWS + row, mask=i < SPLITS, other=float("-inf"))
    top = tl.max(parts, 0)
    sink = top
    if sinks is not None:
        sink = from_natural(tl.load(sinks + h).to(tl.float32), NATURAL)
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(power(parts - safe, NATURAL), 0)
    if sinks is not None:
        total += power(sink - safe, NATURAL)
    total = tl.where(total > 0.0, total, 1.0)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, SPLIT_END, CHUNK):
        split = first + tl.arange(0, CHUNK)  # [CHUNK]
        at = split.to(tl.int64) * ROWS + row  # [CHUNK]
        ok = split < SPLITS  # [CHUNK]
        some = tl.load(
            part_o + at[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
        )  # [CHUNK, BLOCK_D]
        weight = tl.load(part_lse + at, mask=ok, other=float("-inf"))  # [CHUNK]
        acc += tl.sum(power(weight - safe, NATURAL)[:, None] * some, 0)
    at = o + row // (H * T) * o_strides[0] + h * o_strides[1] + row % T * o_strides[2]
    tl.store(at + d, cast(acc / total, o.dtype.element_ty), mask=d < D)
    tl.store(lse + row, to_natural(top + logarithm(total, NATURAL), NATURAL))


def _stretches(count: int, splits: int, block_n: int) -> tuple[int, int]:
    """(keys of a stretch, a multiple of block_n; number of stretches, 0 without keys)."""
    part = max(1, cdiv(cdiv(count, splits), block_n)) * block_n
    return part, cdiv(count, part)


def plan_decode(
    problem: Problem, o: torch.Tensor, lse: torch.Tensor, config: DecodeConfig, arch: Arch
) -> list[Launch]:
    """The two launches that fill ``o`` [B, H, T, D] and ``lse`` [B, H, T] (contiguous).

    There must be at least one key.
    """
    x = problem
    B, H, H_kv, T, S, P, D = x.sizes
    rows = H // H_kv * T
    part_p, splits_p = _stretches(P, config.prefix_splits, config.block_n)
    part_s, splits_s = _stretches(S, config.splits, config.block_n)
    units_p, blocks_p = (1, cdiv(B * rows, config.block_r)) if x.shared else (
        B, cdiv(rows, config.block_r))  # fmt: skip
    blocks_s = cdiv(rows, config.block_m)
    programs_p = units_p * blocks_p * splits_p * H_kv
    programs_s = B * blocks_s * splits_s * H_kv
    splits = splits_p + splits_s
    part_o = x.q.new_empty((splits, B, H, T, D), dtype=torch.float32)
    part_lse = x.q.new_empty((splits, B, H, T), dtype=torch.float32)
    at, offset, offset_stride = x.offsets()
    early = starts_early(x.q, arch)
    args = (
        x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, at, part_o, part_lse,
        strides(x.q), strides(x.k), strides(x.v), strides(x.prefix_key, x.shared),
        strides(x.prefix_value, x.shared), 0 if x.keep is None else x.keep.stride(0),
        offset, offset_stride, x.window or 0, x.scale, x.softcap, B, H, H_kv, T, S, P,
        programs_p, blocks_p, max(1, splits_p), part_p, blocks_s, splits_s, part_s,
    )  # fmt: skip
    meta = x.meta() | dict(
        SHARED=x.shared, BLOCK_M=config.block_m, BLOCK_R=config.block_r, BLOCK_N=config.block_n,
        EARLY=early, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    # all parts of a row are asked for at once; where they are many, in a loop
    block_splits = next_pow2(splits)
    chunk = min(block_splits, max(1, _MERGED // max(16, next_pow2(D))))
    end = tl.constexpr(chunk) if chunk == block_splits else splits
    merge = (part_o, part_lse, x.sinks, o, lse, strides(o), H, T, B * H * T, splits, end)
    how = dict(num_warps=1, num_stages=1)
    if early:  # an option that only NVIDIA's compiler knows
        how |= dict(launch_pdl=True)
    return [
        Launch(_decode_kernel, (programs_p + programs_s,), args, meta),
        Launch(
            _merge_kernel, (B * H * T,), merge,
            dict(D=D, BLOCK_D=meta["BLOCK_D"], BLOCK_SPLITS=block_splits, CHUNK=chunk,
                 NATURAL=meta["NATURAL"], EARLY=early, **how),
        ),
    ]  # fmt: skip


@planned()
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    *,
    config: DecodeConfig | None = None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, LSE) as :func:`.prefix_attention.attend`, computed by a split over the keys.

    Arguments and errors are the same. It is fast for the T of :func:`few_rows` and right for any T.
    """
    problem = check(q, k, v, prefix_key, prefix_value, **options)  # type: ignore[arg-type]
    B, H, H_kv, T, S, P, D = problem.sizes
    if S + P == 0:
        return attend(q, k, v, prefix_key, prefix_value, **options)  # type: ignore[arg-type]
    o, lse = problem.rows_like_q(), q.new_empty(q.shape[:3], dtype=torch.float32)
    if o.numel():
        arch = arch_of(q.device)
        config = config or default_config(problem.sizes, problem.shared, arch, q.element_size())
        for launch in plan_decode(problem, o, lse, config, arch):
            launch.run()
    return o, lse
