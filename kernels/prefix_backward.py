"""The backward of prefix attention: dQ, dK, dV, dKp, dVp, from Q, K, V, O, LSE and dO, nothing of
size T x (P + S) kept or made.

Two launches. Rows: a program has a tile of query rows, makes delta = rowsum(dO * O) and dQ. Keys: a
program has a tile of keys, of the own ones or of the prefix, walks down the query rows of all heads
of its group and keeps dK and dV in registers. A prefix that the batch shares sums over the batch
too; where that leaves too few programs, stretches of the batch give fp32 partials, added in fixed
order. No atomics: two runs agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    check_blocks,
    check_device,
    check_shape,
    device_function,
    dot,
)
from .prefix_attention import key_range
from .prefix_tile import (
    Problem,
    check,
    from_natural,
    kept,
    offset_of,
    power,
    scores,
    store_tile,
    strides,
    tile,
    to_natural,
    unit_rows,
    visible,
)
from .reduce import plan_sum


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of scores: [block_m queries, block_n keys] where a program has rows, [key_m, key_n]
    where it has keys; a shared prefix in ``parts`` stretches of the batch (1: no second stage)."""

    block_m: int = 64
    block_n: int = 64
    key_m: int = 64
    key_n: int = 64
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 2
    key_warps: int = 4
    key_stages: int = 2

    def __post_init__(self) -> None:
        check_blocks(
            self, block_m=self.block_m, block_n=self.block_n, key_m=self.key_m, key_n=self.key_n
        )
        for name, value, allowed in (
            ("parts", self.parts, self.parts >= 1),
            ("key_warps", self.key_warps, self.key_warps in (1, 2, 4, 8, 16)),
            ("key_stages", self.key_stages, self.key_stages >= 1),
        ):
            if not allowed:
                raise ValueError(
                    f"BackwardConfig.{name} is {value}; allowed: 1 or more, "
                    "a power of two up to 16 for warps"
                )


def default_config(
    sizes: tuple[int, int, int, int, int, int, int], shared: bool, arch: Arch, itemsize: int = 2
) -> BackwardConfig:
    """``sizes``: B, H, H_kv, T, S, P, D. Parts of the batch until a shared prefix's programs fill
    the device."""
    B, _, H_kv, _, _, P, D = sizes
    # block_m, block_n, key_m, key_n, num_warps, num_stages, key_warps, key_stages
    if itemsize == 4:
        tiles = (32, 16, 16, 16, 8, 1, 4, 1)
    elif D <= 64:
        tiles = (64, 64, 32, 128, 4, 2, 8, 2) if arch.warpgroups else (64, 64, 32, 64, 4, 2, 8, 1)
    elif D <= 128:
        stages = 1 if arch.blackwell else 2
        tiles = (64, 64, 32, 128, 4, 2, 8, stages)
        tiles = tiles if arch.warpgroups else (64, 32, 32, 64, 4, 2, 8, 2)
    elif arch.warpgroups:
        tiles = (64, 32, 64, 32, 8, 1 if arch.blackwell else 2, 8, 2)
    else:
        tiles = (32, 32, 32, 32, 8, 1, 8, 1)
    block_m, block_n, key_m, key_n, num_warps, num_stages, key_warps, key_stages = tiles
    parts = max(1, min(B, cdiv(arch.sms, max(1, cdiv(P, key_n) * H_kv)))) if shared else 1
    return BackwardConfig(
        block_m, block_n, key_m, key_n, parts, num_warps, num_stages, key_warps, key_stages
    )


def declines(dtype: torch.dtype, D: int) -> str | None:
    """Why this backward should not be chosen on a device, where it would be right and slow."""
    if dtype == torch.float32 and D > 64:
        return f"float32 with head dimension {D}: over 64 its exact products spill registers"
    return None


@device_function
def grad_scores(
    products, grads, lse, delta, see, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """(weights, gradient of scale * products) from Q Kᵀ and dO Vᵀ; lse finite, in power's unit."""
    s = scores(products, scale, softcap, SOFTCAP, NATURAL)
    p = power(s - lse, NATURAL)
    if MASKED:
        p = tl.where(see, p, 0.0)
    ds = p * (grads - delta)
    if SOFTCAP:
        ratio = to_natural(s, NATURAL) / softcap  # tanh
        ds = ds * (1.0 - ratio * ratio)
        if MASKED:  # keys that are not there may have any score
            ds = tl.where(see, ds, 0.0)
    return p, ds


@device_function
def grad_walk(
    rows, grad, lse, delta, k_base, v_base, k_stride, v_stride, keep, own, first, last, shift,
    query, row_ok, window, acc, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_D] + dS K over keys first to last of one source (see prefix_attention.walk)."""
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        if MASKED:
            ok = kept(keep, n, n < last, own)
            see = visible(
                query[:, None], (n - shift)[None, :], row_ok[:, None] & ok[None, :], window,
                CAUSAL, WINDOW,
            )  # fmt: skip
        else:
            ok = tl.full((BLOCK_N,), 1, tl.int1)
            see = ok
        k = tile(k_base, n, ok, k_stride, D, BLOCK_D)
        v = tile(v_base, n, ok, v_stride, D, BLOCK_D)
        zeros = tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
        products = dot(rows, tl.trans(k), zeros, PRECISION)
        grads = dot(grad, tl.trans(v), zeros, PRECISION)
        _, ds = grad_scores(
            products, grads, lse[:, None], delta[:, None], see, scale, softcap, SOFTCAP, MASKED,
            NATURAL,
        )  # fmt: skip
        acc = dot(cast(ds, k.dtype), k, acc, PRECISION)
    return acc


@triton.jit
def _grad_rows_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, q_offset_at, o, lse, grad_o, grad_q, delta,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, o_strides, go_strides, gq_strides,
    keep_stride, q_offset, offset_stride, window, scale, softcap, G, T, S, P,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    hk = h // G
    t = t0 + tl.arange(0, BLOCK_M)
    row_ok = t < T
    offset = offset_of(b, q_offset_at, q_offset, offset_stride)
    query = offset + t
    low = offset + t0
    high = offset + tl.minimum(t0 + BLOCK_M, T) - 1
    at = (b * tl.num_programs(1) + h) * T
    out = tile(o + b * o_strides[0] + h * o_strides[1], t, row_ok, o_strides[2], D, BLOCK_D)
    grad = tile(
        grad_o + b * go_strides[0] + h * go_strides[1], t, row_ok, go_strides[2], D, BLOCK_D
    )
    inner = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + at + t, inner, mask=row_ok)
    row_lse = from_natural(tl.load(lse + at + t, mask=row_ok, other=0.0), NATURAL)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)  # rows that see nothing
    rows = tile(q + b * q_strides[0] + h * q_strides[1], t, row_ok, q_strides[2], D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    own_k = k + b * k_strides[0] + hk * k_strides[1]
    own_v = v + b * v_strides[0] + hk * v_strides[1]
    own_first, own_last = key_range(low, high, S, 0, window, BLOCK_N, CAUSAL, WINDOW)
    if keep is None and not WINDOW and not NATURAL:  # blocks that every row sees whole
        whole = S
        if CAUSAL:
            whole = tl.minimum(S, low + 1)
        own_first = whole // BLOCK_N * BLOCK_N
        acc = grad_walk(
            rows, grad, row_lse, inner, own_k, own_v, k_strides[2], v_strides[2], None, 1,
            0, own_first, 0, query, row_ok, window, acc, scale, softcap,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, NATURAL, PRECISION,
        )  # fmt: skip
    own_keep = None
    if keep is not None:
        own_keep = keep + b * keep_stride
    first, last = key_range(low, high, P, P, window, BLOCK_N, CAUSAL, WINDOW)
    if no_prefix is not None:
        last = tl.where(tl.load(no_prefix + b) != 0, 0, last)
    k_base = prefix_key + b * pk_strides[0] + hk * pk_strides[1]
    v_base = prefix_value + b * pv_strides[0] + hk * pv_strides[1]
    k_stride = pk_strides[2]
    v_stride = pv_strides[2]
    shift = P
    # one loop body for both sources: it takes fewer registers than two
    for own in range(0, 2):
        if own == 1:
            k_base = own_k
            v_base = own_v
            k_stride = k_strides[2]
            v_stride = v_strides[2]
            first = own_first
            last = own_last
            shift = P * 0
        acc = grad_walk(
            rows, grad, row_lse, inner, k_base, v_base, k_stride, v_stride, own_keep, own,
            first, last, shift, query, row_ok, window, acc, scale, softcap,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, NATURAL, PRECISION,
        )  # fmt: skip
    store_tile(
        grad_q + b * gq_strides[0] + h * gq_strides[1], t, row_ok, gq_strides[2],
        cast(acc * scale, grad_q.dtype.element_ty), D, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _grad_keys_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, q_offset_at, lse, grad_o, delta,
    grad_k, grad_v, grad_pk, grad_pv,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, go_strides, gk_strides, gv_strides,
    gp_strides, keep_stride, q_offset, offset_stride, window, scale, softcap, B, H, H_KV, T, S, P,
    PROGRAMS_P, B_PART,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    G = H // H_KV
    of_prefix = program < PROGRAMS_P  # the prefix first: its programs walk down the most rows
    if of_prefix:
        tiles = tl.cdiv(P, BLOCK_N)
        count = P
        shift = P
    else:
        program -= PROGRAMS_P
        tiles = tl.cdiv(S, BLOCK_N)
        count = S
        shift = S * 0
    n0 = program % tiles * BLOCK_N
    hk = (program // tiles % H_KV).to(tl.int64)
    part = (program // (tiles * H_KV)).to(tl.int64)  # rows b0 to b1 of the batch
    if of_prefix:
        b0 = part * B_PART
        b1 = tl.minimum(b0 + B_PART, B)
        k_base = prefix_key + part * pk_strides[0] + hk * pk_strides[1]
        v_base = prefix_value + part * pv_strides[0] + hk * pv_strides[1]
        k_stride = pk_strides[2]
        v_stride = pv_strides[2]
    else:
        b0 = part
        b1 = part + 1
        k_base = k + part * k_strides[0] + hk * k_strides[1]
        v_base = v + part * v_strides[0] + hk * v_strides[1]
        k_stride = k_strides[2]
        v_stride = v_strides[2]
    n = n0 + tl.arange(0, BLOCK_N)
    there = n < count
    own_keep = None
    if keep is not None:
        own_keep = keep + part * keep_stride
    ok = kept(own_keep, n, there, of_prefix == 0)
    keys = tile(k_base, n, ok, k_stride, D, BLOCK_D)
    values = tile(v_base, n, ok, v_stride, D, BLOCK_D)
    key = n - shift
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # one loop over (row of the batch, head of the group)
    for turn in range(0, (b1 - b0) * G):
        b = b0 + turn // G
        h = hk * G + turn % G
        offset = offset_of(b, q_offset_at, q_offset, offset_stride)
        first = 0
        last = T
        if CAUSAL:  # rows before the tile's first key see none of it
            first = tl.maximum(n0 - shift - offset, 0) // BLOCK_M * BLOCK_M
        if WINDOW:
            end = tl.minimum(n0 + BLOCK_N, count) - shift - offset + window - 1
            last = tl.minimum(T, tl.maximum(end, 0))
        if no_prefix is not None:
            last = tl.where(of_prefix & (tl.load(no_prefix + b) != 0), 0, last)
        q_base = q + b * q_strides[0] + h * q_strides[1]
        go_base = grad_o + b * go_strides[0] + h * go_strides[1]
        at = (b * H + h) * T
        for t0 in range(first, last, BLOCK_M):
            t = t0 + tl.arange(0, BLOCK_M)
            row_ok = t < T
            rows = tile(q_base, t, row_ok, q_strides[2], D, BLOCK_D)
            grad = tile(go_base, t, row_ok, go_strides[2], D, BLOCK_D)
            row_lse = from_natural(tl.load(lse + at + t, mask=row_ok, other=0.0), NATURAL)
            row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
            inner = tl.load(delta + at + t, mask=row_ok, other=0.0)
            see = visible(
                (offset + t)[None, :], key[:, None], row_ok[None, :] & ok[:, None], window,
                CAUSAL, WINDOW,
            )  # fmt: skip
            zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            products = dot(keys, tl.trans(rows), zeros, PRECISION)
            grads = dot(values, tl.trans(grad), zeros, PRECISION)
            p, ds = grad_scores(
                products, grads, row_lse[None, :], inner[None, :], see, scale, softcap, SOFTCAP,
                True, NATURAL,
            )  # fmt: skip
            acc_v = dot(cast(p, grad.dtype), grad, acc_v, PRECISION)
            acc_k = dot(cast(ds, rows.dtype), rows, acc_k, PRECISION)
    acc_k *= scale
    if of_prefix:
        at = part * gp_strides[0] + hk * gp_strides[1]
        dtype: tl.constexpr = grad_pk.dtype.element_ty
        store_tile(grad_pk + at, n, there, gp_strides[2], cast(acc_k, dtype), D, BLOCK_D)
        store_tile(grad_pv + at, n, there, gp_strides[2], cast(acc_v, dtype), D, BLOCK_D)
    else:
        own: tl.constexpr = grad_k.dtype.element_ty
        at_k = grad_k + part * gk_strides[0] + hk * gk_strides[1]
        at_v = grad_v + part * gv_strides[0] + hk * gv_strides[1]
        store_tile(at_k, n, there, gk_strides[2], cast(acc_k, own), D, BLOCK_D)
        store_tile(at_v, n, there, gv_strides[2], cast(acc_v, own), D, BLOCK_D)


class Grads(NamedTuple):
    """Gradients in the shapes of what they belong to; ``sinks`` is None where there are none."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    sinks: torch.Tensor | None = None


def plan_backward(
    problem: Problem,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_o: torch.Tensor,
    delta: torch.Tensor,
    grads: Grads,
    config: BackwardConfig,
) -> list[Launch]:
    """Launches that fill ``grads`` (the prefix's contiguous, [1 or B, H_kv, P, D]) and ``delta``
    [B, H, T] fp32; o and grad_o have unit stride along D, lse is contiguous."""
    x, c = problem, config
    B, H, H_kv, T, S, P, D = x.sizes
    at, offset, offset_stride = x.offsets()
    keep_stride = 0 if x.keep is None else x.keep.stride(0)
    common = (offset, offset_stride, x.window or 0, x.scale, x.softcap)
    sources = (
        strides(x.q), strides(x.k), strides(x.v), strides(x.prefix_key, x.shared),
        strides(x.prefix_value, x.shared),
    )  # fmt: skip
    rows = Launch(
        _grad_rows_kernel,
        (cdiv(T, c.block_m), H, B),
        (
            x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, at, o, lse, grad_o,
            grads.q, delta, *sources, strides(o), strides(grad_o), strides(grads.q), keep_stride,
            *common, H // H_kv, T, S, P,
        ),
        x.meta() | dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
                        num_stages=c.num_stages),
    )  # fmt: skip
    b_part = cdiv(B, min(c.parts, B)) if x.shared else 1
    parts = cdiv(B, b_part)
    split = x.shared and parts > 1
    prefix = (grads.prefix_key, grads.prefix_value)
    if split:
        shape = (2, parts, H_kv, P, D)
        partials = x.q.new_empty(shape, dtype=torch.float32).unbind()
    else:
        partials = prefix
    programs_p = cdiv(P, c.key_n) * H_kv * parts
    programs_s = cdiv(S, c.key_n) * H_kv * B
    keys = Launch(
        _grad_keys_kernel,
        (programs_p + programs_s,),
        (
            x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, at, lse, grad_o,
            delta, grads.k, grads.v, *partials, *sources, strides(grad_o), strides(grads.k),
            strides(grads.v), strides(partials[0]), keep_stride, *common, B, H, H_kv, T, S, P,
            programs_p, b_part,
        ),
        x.meta() | dict(BLOCK_M=c.key_m, BLOCK_N=c.key_n, num_warps=c.key_warps,
                        num_stages=c.key_stages),
    )  # fmt: skip
    launches = [rows]
    if programs_p + programs_s:
        launches.append(keys)
    if split and P:
        launches.append(plan_sum(list(zip(partials, prefix, strict=True))))
    return launches


def attend_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    prefix_dtype: torch.dtype | None = None,
    config: BackwardConfig | None = None,
    **options: object,
) -> Grads:
    """Gradients of :func:`.prefix_attention.attend` for dO ``grad_o`` [B, H, T, D], given its ``o``
    and ``lse``; two runs agree bit for bit.

    dQ, dK, dV come in q's dtype, laid out as [B, rows, heads, D]; dKp, dVp in ``prefix_dtype``
    (default q's), summed over the batch where it shares the prefix; the sinks' in fp32. Further
    arguments and errors as there.
    """
    problem = check(q, k, v, prefix_key, prefix_value, **options)  # type: ignore[arg-type]
    B, H, H_kv, T, S, P, D = problem.sizes
    for name, t in (("grad_o", grad_o), ("o", o)):
        check_shape(name, t, tuple(q.shape), "that of q")
        if t.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: {q.dtype}, that of q")
    check_shape("lse", lse, (B, H, T), "[B, H, T] of q")
    if lse.dtype != torch.float32:
        raise TypeError(f"lse has dtype {lse.dtype}; allowed: torch.float32")
    check_device(q=q, grad_o=grad_o, o=o, lse=lse)
    o, grad_o, lse = unit_rows(o), unit_rows(grad_o), lse.contiguous()
    lead = 1 if problem.shared else B
    dtype = prefix_dtype or q.dtype
    grads = Grads(
        problem.rows_like_q(),
        *(q.new_empty((B, S, H_kv, D)).transpose(1, 2) for _ in range(2)),
        *(q.new_empty((lead, H_kv, P, D), dtype=dtype) for _ in range(2)),
    )
    delta = torch.empty_like(lse)
    if q.numel() == 0:
        for t in grads[1:5]:
            t.zero_()
    else:
        config = config or default_config(
            problem.sizes, problem.shared, arch_of(q.device), q.element_size()
        )
        for launch in plan_backward(problem, o, lse, grad_o, delta, grads, config):
            launch.run()
    if problem.sinks is not None:  # its weight has a score's gradient with a value of 0
        share = torch.exp(problem.sinks.float()[None, :, None] - lse)
        grads = grads._replace(sinks=-(share * delta).sum((0, 2)))
    if problem.shared:
        grads = grads._replace(prefix_key=grads.prefix_key[0], prefix_value=grads.prefix_value[0])
    return grads
