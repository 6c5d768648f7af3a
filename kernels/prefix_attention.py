"""Attention over a prefix and own keys in one online softmax, without concatenating them.

    O = softmax(scale * Q [Kp; K]ᵀ) [Vp; V]

Q, O [B, H, T, D]; own K, V [B, H_kv, S, D]; prefix Kp, Vp [H_kv, P, D], shared by the batch, or
[B, H_kv, P, D]. Keys and values are not expanded over the batch or repeated for the heads of a
group. A program has a tile of query rows of one head: it reads the prefix, then the own keys that
its rows can see. Blocks that causality or a sliding window hides are never loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Arch, Launch, arch_of, cast, cdiv, device_function, dot
from .launching import planned
from .prefix_tile import (
    Problem,
    check,
    from_natural,
    kept,
    logarithm,
    offset_of,
    power,
    scores,
    store_tile,
    strides,
    tile,
    to_natural,
    visible,
)


@dataclass(frozen=True)
class AttendConfig:
    """Tiles of scores [block_m queries, block_n keys]."""

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_n=self.block_n)


def default_config(
    D: int, arch: Arch, itemsize: int = 2, hidden: bool = False, causal: bool = False
) -> AttendConfig:
    """A config with the largest tiles that fit.

    The accumulator [block_m, D] must stay in registers, and keys and values in flight in shared
    memory. ``hidden``: a window or masked keys hide more than causality does.
    """
    roomy = arch.shared > 160_000
    if itemsize == 4:  # exact fp32 products also keep their operands in registers
        return AttendConfig(32, 32 if D <= 128 else 16, 4 if D <= 64 else 8, 1)
    if D <= 64:
        if hidden and arch.blackwell:  # 64 keys spill there (Triton 3.9)
            return AttendConfig(128, 32, 8, 5)
        if causal and not hidden and not arch.warpgroups:  # 32 keys spill there (Triton 3.9)
            return AttendConfig(128, 16, 4, 3)
        return AttendConfig(128, 64 if arch.warpgroups else 32, 8 if arch.blackwell else 4, 3)
    if D <= 128:
        if hidden and arch.capability == 120:  # 32 keys spill there (Triton 3.9)
            return AttendConfig(128, 16, 8, 4)
        return AttendConfig(128, 64 if roomy else 32, 8, 3)
    if arch.warpgroups:
        return AttendConfig(128, 32, 8, 2)
    return AttendConfig(64, 32, 8, 3 if roomy else 1)


@device_function
def online_step(
    q, k_base, v_base, k_stride, v_stride, n, ok, see, top, total, acc, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of N keys in the online softmax of M rows; returns the new (top, total, acc).

    top [M] is the largest score so far (in the unit of ``power``), total [M] the sum of weights,
    acc [M, BLOCK_D] the weighted sum of values. q is [M, BLOCK_D], n and ok [N], see [M, N].
    """
    k = tile(k_base, n, ok, k_stride, D, BLOCK_D)  # [N, BLOCK_D]
    products = dot(q, tl.trans(k), tl.zeros((q.shape[0], n.shape[0]), tl.float32), PRECISION)
    s = scores(products, scale, softcap, SOFTCAP, NATURAL)  # [M, N]
    if MASKED:
        s = tl.where(see, s, float("-inf"))
    top_new = tl.maximum(top, tl.max(s, 1))  # [M]
    safe = tl.where(top_new == float("-inf"), 0.0, top_new)  # [M]; avoids NaN in rows of -inf
    p = power(s - safe[:, None], NATURAL)  # [M, N]
    shrink = power(top - safe, NATURAL)  # [M]
    v = tile(v_base, n, ok, v_stride, D, BLOCK_D)  # [N, BLOCK_D]
    acc = dot(cast(p, v.dtype), v, acc * shrink[:, None], PRECISION)
    return top_new, total * shrink + tl.sum(p, 1), acc


@device_function
def walk(
    q, k_base, v_base, k_stride, v_stride, keep, first, last, shift, query, row_ok, window,
    top, total, acc, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`online_step` for the keys first to last of one source, in blocks.

    Key n has coordinate n - shift. Without MASKED every row sees all of these keys.
    """
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        if MASKED:
            ok = kept(keep, n, n < last, 1)  # [BLOCK_N]
            see = visible(
                query[:, None], (n - shift)[None, :], row_ok[:, None] & ok[None, :], window,
                CAUSAL, WINDOW,
            )  # fmt: skip
        else:
            ok = tl.full((BLOCK_N,), 1, tl.int1)
            see = ok
        top, total, acc = online_step(
            q, k_base, v_base, k_stride, v_stride, n, ok, see, top, total, acc, scale, softcap,
            D, BLOCK_D, SOFTCAP, MASKED, NATURAL, PRECISION,
        )  # fmt: skip
    return top, total, acc


@device_function
def key_range(
    low, high, count, shift, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """(first, last): the range of keys that queries at coordinates low to high can see.

    first is a multiple of BLOCK_N.
    """
    first = 0
    last = count
    if CAUSAL:
        last = tl.minimum(count, tl.maximum(high + 1 + shift, 0))
    if WINDOW:
        first = tl.maximum(low - window + 1 + shift, 0) // BLOCK_N * BLOCK_N
    return first, last


@triton.jit
def _attend_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, sinks, q_offset_at, o, lse,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, o_strides, keep_stride,
    q_offset, offset_stride, window, scale, softcap, G, T, S, P,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # the rows with the most keys first, so that none of them starts when the others are done
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    hk = h // G
    t = t0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = t < T  # [BLOCK_M]
    offset = offset_of(b, q_offset_at, q_offset, offset_stride)
    query = offset + t  # [BLOCK_M]
    low = offset + t0
    high = offset + tl.minimum(t0 + BLOCK_M, T) - 1
    rows = tile(
        q + b * q_strides[0] + h * q_strides[1], t, row_ok, q_strides[2], D, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sinks is not None:  # a key with this score and a value of 0
        sink = from_natural(tl.load(sinks + h).to(tl.float32), NATURAL)
        top = tl.full((BLOCK_M,), 0.0, tl.float32) + sink  # [BLOCK_M]
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.full((BLOCK_M,), 0.0, tl.float32)

    first, last = key_range(low, high, P, P, window, BLOCK_N, CAUSAL, WINDOW)
    if no_prefix is not None:
        last = tl.where(tl.load(no_prefix + b) != 0, 0, last)
    top, total, acc = walk(
        rows, prefix_key + b * pk_strides[0] + hk * pk_strides[1],
        prefix_value + b * pv_strides[0] + hk * pv_strides[1], pk_strides[2], pv_strides[2], None,
        first, last, P, query, row_ok, window, top, total, acc, scale, softcap,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, NATURAL,
        PRECISION,
    )  # fmt: skip

    k_base = k + b * k_strides[0] + hk * k_strides[1]
    v_base = v + b * v_strides[0] + hk * v_strides[1]
    first, last = key_range(low, high, S, 0, window, BLOCK_N, CAUSAL, WINDOW)
    own_keep = None
    if keep is not None:
        own_keep = keep + b * keep_stride
    elif not WINDOW:  # blocks that all rows see need no mask
        whole = S
        if CAUSAL:
            whole = tl.minimum(S, low + 1)
        whole = whole // BLOCK_N * BLOCK_N
        top, total, acc = walk(
            rows, k_base, v_base, k_strides[2], v_strides[2], None, 0, whole, 0, query, row_ok,
            window, top, total, acc, scale, softcap,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, NATURAL,
            PRECISION,
        )  # fmt: skip
        first = whole
    top, total, acc = walk(
        rows, k_base, v_base, k_strides[2], v_strides[2], own_keep, first, last, 0, query, row_ok,
        window, top, total, acc, scale, softcap,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, NATURAL,
        PRECISION,
    )  # fmt: skip

    total = tl.where(total > 0.0, total, 1.0)  # [BLOCK_M]
    at = o + b * o_strides[0] + h * o_strides[1]
    out = cast(acc / total[:, None], o.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    store_tile(at, t, row_ok, o_strides[2], out, D, BLOCK_D)
    lse_row = lse + (b * tl.num_programs(1) + h) * T
    tl.store(lse_row + t, to_natural(top + logarithm(total, NATURAL), NATURAL), mask=row_ok)


def plan_attend(
    problem: Problem, o: torch.Tensor, lse: torch.Tensor, config: AttendConfig
) -> list[Launch]:
    """The launch that fills ``o`` [B, H, T, D] (unit stride along D) and ``lse`` [B, H, T].

    ``lse`` is contiguous.
    """
    x = problem
    B, H, H_kv, T, S, P, _ = x.sizes
    at, offset, offset_stride = x.offsets()
    args = (
        x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, x.sinks, at, o, lse,
        strides(x.q), strides(x.k), strides(x.v), strides(x.prefix_key, x.shared),
        strides(x.prefix_value, x.shared), strides(o),
        0 if x.keep is None else x.keep.stride(0), offset, offset_stride, x.window or 0, x.scale,
        x.softcap, H // H_kv, T, S, P,
    )  # fmt: skip
    meta = x.meta() | dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [Launch(_attend_kernel, (cdiv(T, config.block_m), H, B), args, meta)]


@planned()
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int | torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    no_prefix: torch.Tensor | None = None,
    config: AttendConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O [B, H, T, D] in q's dtype, LSE [B, H, T] fp32).

    LSE is the natural logarithm of each row's sum of exponentials. A row that sees no key gives 0
    and -inf. For few rows over many keys see :func:`.prefix_decode.decode`.

    Args:
        q: [B, H, T, D], D up to 256; fp16, bf16 or fp32. q, k and v may have any strides over B, H
            and rows (copied only if D has no unit stride).
        k, v: own keys and values [B, H_kv, S, D], H a multiple of H_kv.
        prefix_key, prefix_value: [H_kv, P, D], shared by the batch, or [B, H_kv, P, D]; P may be 0.
        scale: factor of the scores; default D ** -0.5.
        causal: own query t sees own keys up to q_offset + t, and the whole prefix.
        q_offset: 0 or more; default S - T. Or an int32/int64 tensor on the device, of one element
            or [B]; the host does not wait for it, and its values are not checked.
        keep: bool or int8 [B, S], 0 where an own key is padding; these keys and values are never
            used.
        window: each query sees the ``window`` positions up to its own, where the prefix counts as
            the first P; needs causal.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H], for each head the score of a further key whose value is 0.
        no_prefix: bool or int8 [B], True for rows of the batch that see no prefix.

    Raises:
        TypeError, ValueError: naming the argument, before any launch.
    """
    problem = check(
        q, k, v, prefix_key, prefix_value, scale=scale, causal=causal, q_offset=q_offset, keep=keep,
        window=window, softcap=softcap, sinks=sinks, no_prefix=no_prefix,
    )  # fmt: skip
    o, lse = problem.rows_like_q(), q.new_empty(q.shape[:3], dtype=torch.float32)
    if o.numel():
        hidden = keep is not None or window is not None
        config = config or default_config(
            q.shape[3], arch_of(q.device), q.element_size(), hidden, causal
        )
        for launch in plan_attend(problem, o, lse, config):
            launch.run()
    return o, lse
