"""The gradients through H = act(G) ∘ U of an MLP, in one pass over dH, G and U.

G, U, dH, dG, dU [M, K], where K is the number of inputs of down; for gate and for up B [K, r] and
S, dS [M, r]; for down dS [M, r] and A [r, K].

    dG = dH ∘ U ∘ act'(G)        dS = scale * dG B, dB = dGᵀ S     gate
    dU = dH ∘ act(G)             dS = scale * dU B, dB = dUᵀ S     up
                                 dA = dSᵀ (mask H)                 down, with H made again

A program owns a strip of columns and walks down the rows, so the sums over rows, dB and dA, are in
its registers. dS is a sum over strips: each writes an fp32 part of it, and a second kernel adds the
parts in fixed order (no atomics). Where that would cost more than other passes over dG, dU and H,
:func:`ways` says so, and :func:`.shrink.shrink` or :func:`.grad_a.grad_a` makes the rest. Where the
base product takes dG and dU in fp8, the pass writes these (:mod:`.fp8_rows`); and where the
products of G, U and dH were in fp8, it adds their low-rank parts (:mod:`.mlp_low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import checks, fp8_rows, mlp_low_rank
from .common import (
    INTERPRET,
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    device_function,
    dot,
    keep_tile,
    next_pow2,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .fp8_rows import Fp8Rows
from .fp8_rows import write as write_fp8
from .grad_a import default_config as default_grad_a_config
from .grad_a import plan_grad_a
from .launching import planned
from .mlp import both
from .mlp_arguments import MlpGrads, MlpMember, check, check_members, check_outs
from .mlp_low_rank import left_rows, plus, right_columns
from .reduce import plan_sum, sums_last
from .shrink import default_config as default_shrink_config
from .shrink import plan_shrink

PART_RANK = 16  # above, parts of dS are more bytes than dG and dU, which shrink reads for it


class Ways(NamedTuple):
    """What the pass over dH, G and U makes besides dG and dU."""

    low: bool  # dS of gate and up; else shrink makes it of dG and dU
    sums: bool  # dB and dA; else grad_a makes them of dG, dU and H, which the pass then writes


def ways(r: int, itemsize: int, arch: Arch) -> Ways:
    """What fits one launch for the largest rank ``r`` and activations of ``itemsize`` bytes.

    Accumulators of large ranks fit where matrix instructions read operands from shared memory.
    Exact fp32 products keep theirs in registers, of which nothing is left.
    """
    sums = itemsize == 2 and r <= (128 if arch.warpgroups else 32)
    return Ways(sums and r <= PART_RANK, sums)


def adds(r: int, itemsize: int, arch: Arch) -> bool:
    """True where the pass can add low-rank parts of ranks up to r to G, U and dH."""
    return all(ways(r, itemsize, arch))


@dataclass(frozen=True)
class MlpGradConfig:
    """Tiles of G [block_m, block_k]; M is split into split_m parts (1: dB and dA have no parts)."""

    block_m: int = 32
    block_k: int = 128
    split_m: int = 1
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_m=self.split_m)


def default_config(
    M: int, K: int, r: int, arch: Arch, itemsize: int = 2, masked: bool = True,
    copied: bool = False,
) -> MlpGradConfig:  # fmt: skip
    """A config with strips wide enough for few parts of dS, and as many warps as registers allow.

    r is the largest rank, 0 without adapters; masked: with down's mask. M is split, into parts of
    at least 256 rows, so that the last wave of programs is full, if that is worth the parts of dB
    and dA. With an fp8 copy (``copied``) strips are as wide as what shares a scale.
    """
    low, sums = ways(r, itemsize, arch)
    block_k = 128 if low or not sums or copied else 64
    warps = 8
    if low and r and arch.warpgroups and not masked and not copied:
        warps = 16  # with a mask or an fp8 copy, and on sm_80, they spill
    elif sums and r > PART_RANK and not arch.warpgroups:
        warps = 4  # with 8 the assembler keeps to 128 registers on sm_120, and spills
    slots = arch.sms * (1 if r > 64 or (low and r) else 2)  # programs that fit, by registers
    strips = cdiv(K, block_k)

    def cost(split: int) -> float:
        """Waves of programs, each as long as its part of M, and the parts' share of all bytes."""
        return cdiv(strips * split, slots) * slots / split + 2.4 * r * strips * split / M

    tallest, stages = 32, 3
    if arch.capability == 90 and copied and masked and r > 32:
        tallest, stages = 16, 5  # with 32 rows Triton 3.9 spills; as many rows are on the way
    return MlpGradConfig(
        block_m=min(tallest, max(16, next_pow2(M))),
        block_k=block_k,
        split_m=min(range(1, max(1, min(8, M // 256)) + 1), key=cost),
        num_warps=warps,
        num_stages=stages,
    )


@device_function
def _once(x, ONCE: tl.constexpr):
    """x, computed once in the layout of loads and stores.

    The compiler would compute it again, from the loads on, in the layout of each product's operand.
    An instruction with side effects (here none at all, in place) it leaves as one.
    """
    if ONCE and not INTERPRET:
        x = tl.inline_asm_elementwise(
            "", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )
    return x


@triton.jit(do_not_specialize=["M", "M_PART"])
def _mlp_grad_kernel(
    dh, gate, up, dgate, dup, h, Bs, Ss, ds_outs, db_outs, scales, ranks,
    b_k_strides, b_r_strides, s_strides, ds, da_out, words, R, ds_stride, WORDS,
    M, K, M_PART, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride,
    qs, q_scales, q_strides, q_scales_strides, a, a_r_stride, a_k_stride,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, ONCE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    strip, part = tl.program_id(0), tl.program_id(1)
    k0 = strip * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_ok = k < K  # [BLOCK_K]
    k64 = k.to(tl.int64)  # [BLOCK_K]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    # Products have the ranks as their rows: so the tiles of dG, dU and H are right operands.
    zero = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    bs = ()  # each [BLOCK_R, BLOCK_K]
    dbs = ()  # each [BLOCK_R, BLOCK_K]
    for i in tl.static_range(len(scales)):
        dbs = dbs + (zero,)
        b = zero
        if ds_outs[i] is not None:
            b = tl.load(
                Bs[i] + k64[None, :] * b_k_strides[i] + rank[:, None] * b_r_strides[i],
                mask=(rank < ranks[i])[:, None] & k_ok[None, :],
                other=0.0,
            )
        bs = bs + (cast(b, dh.dtype.element_ty),)
    da = zero
    a_strip = zero  # [BLOCK_R, BLOCK_K]
    if a is not None:
        a_strip = right_columns(
            a, a_r_stride, a_k_stride, R, k64, k_ok, dh.dtype.element_ty, BLOCK_R
        )
    first = part * M_PART
    last = tl.minimum(first + M_PART, M)
    # the number of stages stands here because a loop without products is not pipelined otherwise
    for m0 in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        ok = row_ok[:, None] & k_ok[None, :]  # [BLOCK_M, BLOCK_K]
        g = tl.load(gate + row64[:, None] * gate_stride + k[None, :], mask=ok, other=0.0)
        d = tl.load(dh + row64[:, None] * dh_stride + k[None, :], mask=ok, other=0.0)
        if a is not None:
            left = left_rows(ds, ds_stride, R, row64, row_ok, BLOCK_R)
            if words is None:
                d = plus(d, left, a_strip, PRECISION)
            else:
                keep = keep_tile(words, row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                low = dot(left, a_strip, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
                d = cast(d.to(tl.float32) + tl.where(keep, low, 0.0), d.dtype)
        if ADD:
            if Bs[0] is not None:
                left = left_rows(Ss[0], s_strides[0], ranks[0], row64, row_ok, BLOCK_R)
                g = plus(g, left, bs[0], PRECISION)  # type: ignore[misc]
        value, slope = both(g.to(tl.float32), ACT)  # each [BLOCK_M, BLOCK_K]
        # rounded where the separate operations round
        value = cast(value, g.dtype)
        if up is not None:
            u = tl.load(up + row64[:, None] * up_stride + k[None, :], mask=ok, other=0.0)
            if ADD:
                if Bs[1] is not None:
                    left = left_rows(Ss[1], s_strides[1], ranks[1], row64, row_ok, BLOCK_R)
                    u = plus(u, left, bs[1], PRECISION)  # type: ignore[misc]
            u32, d32 = u.to(tl.float32), d.to(tl.float32)  # each [BLOCK_M, BLOCK_K]
            du = cast(d32 * value.to(tl.float32), g.dtype)
            if dup is not None:
                tl.store(dup + row64[:, None] * dup_stride + k[None, :], du, mask=ok)
            if qs[1] is not None:
                write_fp8(
                    du, qs[1], q_scales[1], q_strides[1], q_scales_strides[1], row, row_ok, k0
                )
            d = cast(d32 * u32, g.dtype)
            value = cast(value.to(tl.float32) * u32, g.dtype)
        dg = cast(d.to(tl.float32) * slope, g.dtype)
        if dgate is not None:
            tl.store(dgate + row64[:, None] * dgate_stride + k[None, :], dg, mask=ok)
        if qs[0] is not None:
            write_fp8(dg, qs[0], q_scales[0], q_strides[0], q_scales_strides[0], row, row_ok, k0)
        if h is not None:
            tl.store(h + row64[:, None] * h_stride + k[None, :], value, mask=ok)
        new = ()
        for i in tl.static_range(len(scales)):
            db = zero
            if Bs[i] is not None:
                if i == 0:
                    grad = _once(dg, ONCE)
                else:
                    grad = _once(du, ONCE)
                rm_ok = (rank < ranks[i])[:, None] & row_ok[None, :]  # [BLOCK_R, BLOCK_M]
                if ds_outs[i] is not None:
                    low = dot(
                        bs[i], tl.trans(grad), tl.zeros((BLOCK_R, BLOCK_M), tl.float32), PRECISION
                    )  # [BLOCK_R, BLOCK_M]
                    tl.store(
                        ds_outs[i]
                        + (strip.to(tl.int64) * M + row64[None, :]) * ranks[i]
                        + rank[:, None],
                        cast(low * scales[i], ds_outs[i].dtype.element_ty),
                        mask=rm_ok,
                    )
                if db_outs[i] is not None:
                    s = tl.load(
                        Ss[i] + row64[None, :] * s_strides[i] + rank[:, None], mask=rm_ok, other=0.0
                    )  # [BLOCK_R, BLOCK_M]
                    db = dot(s, grad, dbs[i], PRECISION)
            new = new + (db,)
        dbs = new
        if da_out is not None:
            kept = _once(value, ONCE)
            if words is not None:
                keep = keep_tile(words, row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                kept = tl.where(keep, kept, 0.0).to(g.dtype)  # [BLOCK_M, BLOCK_K]
            s = tl.load(
                ds + row64[None, :] * ds_stride + rank[:, None],
                mask=(rank < R)[:, None] & row_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_M]
            da = dot(s, kept, da, PRECISION)
    part64 = part.to(tl.int64)
    for i in tl.static_range(len(scales)):
        if db_outs[i] is not None:
            tl.store(
                db_outs[i] + (part64 * K + k64[None, :]) * ranks[i] + rank[:, None],
                cast(dbs[i], db_outs[i].dtype.element_ty),
                mask=(rank < ranks[i])[:, None] & k_ok[None, :],
            )
    if da_out is not None:
        tl.store(
            da_out + (part64 * R + rank[:, None]) * K + k64[None, :],
            cast(da, da_out.dtype.element_ty),
            mask=(rank < R)[:, None] & k_ok[None, :],
        )


def _partial(out: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Room for ``count`` fp32 parts of ``out``; for one, ``out`` itself."""
    if out is None or count == 1:
        return out
    return out.new_empty((count, *out.shape), dtype=torch.float32)


def plan_mlp_grad(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    act: str,
    members: Sequence[MlpMember | None],
    ds: torch.Tensor | None,
    words: torch.Tensor | None,
    out: MlpGrads,
    config: MlpGradConfig,
    arch: Arch,
    copies: Sequence[Fp8Rows | None] = (None, None),
    a: torch.Tensor | None = None,
    add: bool = False,
) -> list[Launch]:
    """Launches that fill ``out``, whose ``da`` needs ``ds`` [M, r] of down; arguments are checked.

    ``copies`` have room for dG and dU in fp8; ``out`` may lack dG and dU then. With ``a`` [r, K] of
    down dH has no low-rank part yet, and with ``add`` G and U have none.

    What the one pass does not take is made by ``shrink`` (dS) and ``grad_a`` (dB, dA).
    """
    M, K = gate.shape
    ranks = [0 if m is None else m.b.shape[1] for m in members]
    down = 0 if ds is None or out.da is None else ds.shape[1]
    low, sums = ways(max([*ranks, down]), dh.element_size(), arch)
    m_part = cdiv(cdiv(M, config.split_m), config.block_m) * config.block_m
    split, strips = cdiv(M, m_part), cdiv(K, config.block_k)
    ds_parts = [_partial(o, strips) if low else None for o in out.ds]
    db_parts = [_partial(o, split) if sums else None for o in out.db]
    da_part = _partial(out.da, split) if sums else None
    h = None if sums or not down else gate.new_empty((M, K))
    held = [m if m is not None and (low or (sums and m.s is not None)) else None for m in members]
    args = (
        dh, gate, up, out.dgate, out.dup, h,
        tuple(None if m is None else m.b for m in held),
        tuple(None if m is None else m.s for m in held),
        tuple(ds_parts), tuple(db_parts),
        tuple(0.0 if m is None else float(m.scale) for m in members), tuple(ranks),
        tuple(0 if m is None else m.b.stride(0) for m in members),
        tuple(0 if m is None else m.b.stride(1) for m in members),
        tuple(0 if m is None or m.s is None else row_stride(m.s) for m in members),
        ds if sums and down else None, da_part, words if sums and down else None,
        down, 0 if ds is None else row_stride(ds), cdiv(K, 32), M, K, m_part,
        row_stride(dh), row_stride(gate), 0 if up is None else row_stride(up),
        *(0 if t is None else row_stride(t) for t in (out.dgate, out.dup, h)),
        *zip(*map(fp8_rows.arguments, copies), strict=True),
        a, 0 if a is None else a.stride(0), 0 if a is None else a.stride(1),
    )  # fmt: skip
    block_r = padded(max([1, *ranks, down]) if sums else 1)
    # 64 rows are what instructions that read operands from shared memory take, in fewer registers
    block_r = max(64, block_r) if block_r > 16 and arch.warpgroups else block_r
    meta = dict(
        ACT=act, BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=block_r,
        PRECISION=precision(dh.dtype), STAGES=config.num_stages, ONCE=block_r < 64,
        ADD=add,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_mlp_grad_kernel, (strips, split), args, meta)]
    pairs = [
        (part, o)
        for part, o in zip([*ds_parts, *db_parts, da_part], [*out.ds, *out.db, out.da], strict=True)
        if part is not None and o is not None and part is not o
    ]
    if pairs:
        launches.append(plan_sum(pairs))
    launches += _plan_apart(members, ds, words, out, h, low, sums, arch)
    return sums_last(launches)


def _plan_apart(
    members: Sequence[MlpMember | None],
    ds: torch.Tensor | None,
    words: torch.Tensor | None,
    out: MlpGrads,
    h: torch.Tensor | None,
    low: bool,
    sums: bool,
    arch: Arch,
) -> list[Launch]:
    """The launches for what the one pass does not make, from dG, dU and H that it has written."""
    launches = []
    for member, grad, d, db in zip(members, (out.dgate, out.dup), out.ds, out.db, strict=True):
        if member is None or grad is None:
            continue
        (M, K), r = grad.shape, member.b.shape[1]
        if d is not None and not low:
            launches += plan_shrink(
                grad, [member.b.T], [None], [member.scale], d,
                default_shrink_config(M, K, [r], arch, grad.element_size()),
            )  # fmt: skip
        if db is not None and member.s is not None and not sums:
            config = default_grad_a_config(M, K, arch, [r], grad.element_size())
            launches += plan_grad_a(grad, [member.s], [None], [db.T], config)
    if h is not None and ds is not None and out.da is not None:
        M, K = h.shape
        config = default_grad_a_config(M, K, arch, [ds.shape[1]], h.element_size())
        launches += plan_grad_a(h, [ds], [words], [out.da], config)
    return launches


@planned("members")
def mlp_grad(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    act: str = "silu",
    members: Sequence[MlpMember | None] = (None, None),
    ds: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    *,
    outs: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    copies: tuple[Fp8Rows, Fp8Rows | None] | None = None,
    a: torch.Tensor | None = None,
    add: bool = False,
    da_dtype: torch.dtype = torch.float32,
    config: MlpGradConfig | None = None,
) -> MlpGrads:
    """dG, dU [M, K], and those wanted of dS [M, r] and dB [K, r] of gate and up, dA [r, K] of down.

    dh, gate, up [M, K] fp16/bf16/fp32 of one dtype, any row stride, up may be None; act: one of
    :data:`.mlp_arguments.ACTIVATIONS`; members: the adapters of gate and of up, None without one;
    their b is fp32 or gate's dtype, any strides, their s gate's dtype, any row stride; ds [M, r] of
    down, None if dA is not wanted; bits: the packed mask of H, int32 [M, ceil(K / 32)]. Ranks are
    from 1 to 256. dS is in gate's dtype, dB in b's, dA in ``da_dtype``. ``outs``: where dG and dU
    go, [M, K] with unit strides along rows, such as two halves of one matrix; new ones by default.
    ``copies``: room for dG and dU in fp8, which are written in place of dG and dU; these are None
    then, but where dS or dB is made of them. K is a multiple of 128 and block_k of a config 128.
    ``a`` [r, K] of down, fp32 or gate's dtype, any strides: dh is without mask (dS A), which is
    added; ``add``: gate and up are without the S Bᵀ of their members, which must have S. Both only
    where :func:`adds` says so. Errors: TypeError or ValueError naming the argument, before any
    launch.
    """
    gate, up = check(gate, up, act)
    M, K = gate.shape
    dh = checks.rows("dh", dh, (gate.dtype,))
    checks.shape("dh", dh, (M, K), "as gate")
    members = check_members(members, gate, up)
    if ds is None and bits is not None:
        raise ValueError("bits is given without ds; allowed: a mask for the adapter that reads H")
    if ds is not None:
        [ds] = checks.low_rank("ds", [ds], M, gate.dtype, "gate has M rows")
    [words] = checks.masks(bits, 1, M, K)
    arch = arch_of(dh.device)
    a = mlp_low_rank.check_grad(a, add, members, ds, gate, partial(adds, arch=arch))
    rooms: tuple[Fp8Rows | None, Fp8Rows | None] = copies or (None, None)
    if copies is not None and (rooms[1] is None) != (up is None):
        raise ValueError("copies[1] is given without up, or up without it; allowed: both")
    for i, copy in enumerate(rooms):
        fp8_rows.check(f"copies[{i}]", copy, (M, K), arch)
    held = [m.b for m in members if m is not None]
    r = max((t.shape[1] for t in (*held, *([] if ds is None else [ds]))), default=0)
    dgate, dup = None, None
    if copies is None or (held and not all(ways(r, dh.element_size(), arch))):
        dgate, dup = check_outs(outs, gate, up)
    checks.device(
        dh=dh, gate=gate, up=up, ds=ds, a=a, bits=words, outs=[dgate, dup],
        copies=[t for copy in rooms if copy is not None for t in copy],
        b=[None if m is None else m.b for m in members],
        s=[None if m is None else m.s for m in members],
    )  # fmt: skip
    out = MlpGrads(
        dgate,
        dup,
        [None if m is None else dh.new_empty((M, m.b.shape[1])) for m in members],
        [
            None if m is None or m.s is None else dh.new_empty(m.b.shape, dtype=m.b.dtype)
            for m in members
        ],
        None if ds is None else dh.new_empty((ds.shape[1], K), dtype=da_dtype),
    )
    if M == 0 or K == 0:
        for t in (*out.ds, *out.db, out.da):
            if t is not None:
                t.zero_()
        return out
    if config is None:
        size, copied = dh.element_size(), copies is not None
        config = default_config(M, K, r, arch, size, words is not None, copied)
    for copy in rooms:
        fp8_rows.check_width("config.block_k", config.block_k, copy)
    for launch in plan_mlp_grad(
        dh, gate, up, act, members, ds, words, out, config, arch, rooms, a, add
    ):
        launch.run()
    return out
