"""The gradients through the gate of a mixture, in one pass over dH and GU.

Rows are in the order of a :class:`.experts_route.Route`; row p has the routing weight w_p and an
expert e. GU, dGU [P, N] with N = 2·I, or I where G is alone; H, dH0 [P, I], dH0 without w_p;
B [E, N, r] and S, dS [P, r] of the first linear; dS' [P, r'] of the second, without w_p.

    H = gate(GU)        dw_p = dH0[p] · H[p]        dGU = backward of the gate for w_p dH0[p]
    dS = scale * dGU B_e        dB_e = Σ over rows of e of dGUᵀ S
    dA'_e = Σ over rows of e of w_p dS'[p]ᵀ (mask H)[p]        of the second linear, which reads H

A program has a group and a strip of columns of H, and walks down the group's rows, so that dB and
dA' are in its registers. dS and dw are sums over strips: each strip writes an fp32 part, and a
second kernel adds the parts in fixed order (no atomics). Above PART_RANK ranks the parts of dS
would be more bytes than dGU, and :mod:`.experts_shrink` makes dS of that. For ranks above those of
one program dH and GU are read again for each further block of ranks, for dB. dA' takes no further
blocks (:func:`fits`): where it would, H is written, and :func:`.experts_grad.grad_a` makes dA'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import checks
from .common import Arch, Launch, arch_of, cdiv, padded, precision, row_stride
from .experts_gate_grad_tile import _experts_gate_grad_kernel, _experts_gate_sum_kernel
from .experts_gates import Clamp, check_gate, check_rows, constants, inner_width
from .experts_grad import default_config as default_grad_a_config
from .experts_grad import plan_grad_a
from .experts_low_rank import check_factors
from .experts_route import Route, checked_weights, one_adapter
from .experts_shrink import default_config as default_shrink_config
from .experts_shrink import plan_shrink
from .launching import planned
from .reduce import AHEAD, BLOCK

PART_RANK = 32


@dataclass(frozen=True)
class ExpertsGateGradConfig:
    """Tiles of H [block_m, block_k], and ranks of a program: of dB and dS, and of dA'."""

    block_m: int = 32
    block_k: int = 128
    block_r: int = 16
    block_a: int = 16
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_r=self.block_r, block_a=self.block_a)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words


class ExpertsGateGrads(NamedTuple):
    """The gradients, in the route's order of rows but for dw; None for what is not wanted."""

    dgu: torch.Tensor  # [P, N]
    dw: torch.Tensor  # fp32 [P], of pair t·k + j
    ds: torch.Tensor | None  # [P, r]
    db: torch.Tensor | None  # fp32 [E, N, r]
    da: torch.Tensor | None  # fp32 [E, r', I], of the second linear


def _most_ranks(arch: Arch, itemsize: int) -> int:
    """The ranks whose sums a program holds; exact products have their operands there too."""
    return 16 if itemsize == 4 else 64 if arch.warpgroups else 32


def fits(r: int, sums: bool, r_down: int, arch: Arch, itemsize: int = 2) -> bool:
    """True where the pass makes dA' of rank ``r_down``, so that nobody writes H.

    That is where the blocks of ranks that dB and dS take are enough for it: another reads 3·I
    numbers a row again, and H is 2·I to write and to read. ``r`` is the first linear's rank, 0
    without an adapter, and ``sums`` says whether its dB is wanted.
    """
    most = _most_ranks(arch, itemsize)
    own = r if sums or r <= PART_RANK else 0
    return cdiv(r_down, most) <= cdiv(max(own, 1), most)


def default_config(
    r: int, layout: str, arch: Arch, itemsize: int = 2, r_down: int = 0
) -> ExpertsGateGradConfig:
    """The widest strips, for few parts of dS, whose accumulators of dB and dA' fit the registers.

    ``r_down`` is 0 unless the pass makes dA'.
    """
    most = _most_ranks(arch, itemsize)
    if itemsize == 4:
        warps = 4 if layout == "halves" else 8
        return ExpertsGateGradConfig(16, 32, most, most, num_warps=warps)
    if max(r, r_down) > 16:
        # with 8 the assembler keeps to 128 registers on sm_90, and spills
        few = 0 < r <= 16 and r_down <= 32 and arch.warpgroups
        warps = 4 if few and layout == "halves" else 8
        return ExpertsGateGradConfig(block_k=64, block_r=most, block_a=most, num_warps=warps)
    # without dS a strip may be narrow, and in a wide one a mask beside dA' alone spills
    narrow = layout == "interleaved" or (r_down and not r)
    return ExpertsGateGradConfig(block_k=64 if narrow else 128)


def plan_gate_grad(
    dh: torch.Tensor,
    gu: torch.Tensor,
    route: Route,
    name: str,
    layout: str,
    weights: torch.Tensor,
    b: torch.Tensor | None,
    s: torch.Tensor | None,
    scale: float,
    clamp: tuple[float, float, float] | None,
    ds_down: torch.Tensor | None,
    words: torch.Tensor | None,
    out: ExpertsGateGrads,
    config: ExpertsGateGradConfig,
    arch: Arch,
) -> list[Launch]:
    """Launches that fill ``out``.

    Its ``ds`` needs ``b``, ``db`` needs ``s`` too, and ``da`` needs ``ds_down``. The arguments are
    checked already, and ``weights`` is contiguous.
    """
    (P, K), N = dh.shape, gu.shape[1]
    r, strips = 1 if b is None else b.shape[2], cdiv(K, config.block_k)
    part = cdiv(P, 16) * 16  # rows of a part, so that each starts on 16 bytes
    dw_parts = dh.new_empty((strips, part), dtype=torch.float32)
    low = b is not None and r <= PART_RANK
    ds_parts = dh.new_empty((strips, part, r), dtype=torch.float32) if low else None
    r_all, r = r, r if low or s is not None else 1  # of the pass over dH and GU
    block_r = min(config.block_r, padded(r))
    chunks = cdiv(r, block_r)
    r_down = 0 if ds_down is None else ds_down.shape[1]
    h = dh.new_empty((P, K)) if cdiv(r_down, config.block_a) > chunks else None
    inside = r_down if h is None else 0  # ranks of dA' in this pass
    block_a = min(config.block_a, padded(max(inside, 1)))
    args = (
        dh, gu, out.dgu, h, weights, route.pairs, route.offsets, b, s, ds_parts, out.db,
        dw_parts, float(scale), r, *((0, 0, 0) if b is None else b.stride()),
        0 if s is None else row_stride(s), *constants(clamp), part, K, N,
        row_stride(dh), row_stride(gu), row_stride(out.dgu), 0 if h is None else row_stride(h),
        *((ds_down, words, out.da) if inside else (None, None, None)), inside,
        0 if ds_down is None else row_stride(ds_down), cdiv(K, 32),
    )  # fmt: skip
    meta = dict(
        ACT=name, CLAMPED=clamp is not None, LAYOUT=layout, BLOCK_M=config.block_m,
        BLOCK_K=config.block_k, BLOCK_R=block_r, BLOCK_A=block_a, PRECISION=precision(dh.dtype),
        STAGES=config.num_stages, ONCE=max(block_r, block_a) < 64,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (strips, route.experts, chunks)
    first = Launch(_experts_gate_grad_kernel, grid, args, meta)
    sums = (
        dw_parts, out.dw, route.pairs, route.offsets[-1:], ds_parts, out.ds if low else None,
        P, r, P * r, part, strips,
    )  # fmt: skip
    blocks = (cdiv(P * r, BLOCK), 2) if low else (cdiv(P, BLOCK), 1)
    meta = dict(BLOCK=BLOCK, AHEAD=AHEAD, num_warps=4, num_stages=1)
    launches = [first, Launch(_experts_gate_sum_kernel, blocks, sums, meta)]
    if b is not None and out.ds is not None and not low:
        shrink_config = default_shrink_config(
            P, N, r_all, route.experts, route.block_m, arch, dh.element_size()
        )
        launches += plan_shrink(
            out.dgu, route, [b.transpose(1, 2)], [scale], False, None, out.ds, shrink_config
        )
    if h is not None and ds_down is not None and out.da is not None:
        grad_a_config = default_grad_a_config(
            P, K, r_down, route.experts, arch, dh.element_size(),
            masked=words is not None, indirect=True,
        )  # fmt: skip
        launches += plan_grad_a(ds_down, h, route, False, weights, words, out.da, grad_a_config)
    return launches


@planned("scale")
def gate_grad(
    dh0: torch.Tensor,
    gu: torch.Tensor,
    route: Route,
    name: str,
    layout: str,
    weights: torch.Tensor,
    b: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    ds_down: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    clamp: Clamp | tuple[float, float, float] | None = None,
    config: ExpertsGateGradConfig | None = None,
) -> ExpertsGateGrads:
    """dGU, dw, dS and dB of the first linear's adapter where it has one, and dA' of the second's.

    Pairs that are in no group of the route get a dw of 0; their rows of the others are unspecified.

    Args:
        dh0: [P, I] fp16/bf16/fp32, the gradient of H without the routing weights, any row stride.
        gu: [P, N] in dh0's dtype, any row stride.
        route: of one adapter.
        name, layout, clamp: the gate, as in :func:`.experts_gate.gate`.
        weights: the routing weights [T, k], or [T·k], fp32 or gu's dtype.
        b: [E, N, r] fp32 or gu's dtype, any strides, r from 1 to 256; without it no dS and dB.
        s: [P, r] in gu's dtype, any row stride; without it no dB.
        scale: of dS; it must include 1 / (1 - p).
        ds_down: dS' [P, r'] in gu's dtype, without the routing weights, any row stride, r' from 1
            to 256; without it no dA'.
        bits: the packed keep mask of H in dA', int32 [P, ceil(I / 32)], in the route's order.

    Raises:
        TypeError, ValueError: naming the argument, before any launch.
    """
    gu = check_gate(gu, name, layout, clamp)
    check_rows("gu", gu, route)
    P, N, dtype = *gu.shape, gu.dtype
    K = inner_width(N, layout)
    dh0 = checks.rows("dh0", dh0, (dtype,))
    checks.shape("dh0", dh0, (P, K), "[the route's pairs, inner width of gu]")
    one_adapter(route, "gradients")
    checked = checked_weights("weights", weights, route, dtype)
    assert checked is not None
    weights = checked
    if b is not None:
        [b] = check_factors("b", [b], 1, route.experts, 2, N, dtype)
    if s is not None:
        if b is None:
            raise ValueError("s is given without b; allowed: both, b alone, or neither")
        [s] = checks.low_rank("s", [s], P, dtype, "gu has P rows")
        checks.shape("s", s, (P, b.shape[2]), "[rows of gu, rank of b]")
    if ds_down is not None:
        ds_down = checks.rows("ds_down", ds_down, (dtype,))
        checks.rank("ds_down", ds_down.shape[1])
        checks.shape("ds_down", ds_down, (P, ds_down.shape[1]), "a row for each row of gu")
    elif bits is not None:
        raise ValueError("bits is given without ds_down; allowed: a mask for dA of what reads H")
    words = checks.words("bits", bits, P, K)
    checks.device(
        dh0=dh0, gu=gu, pairs=route.pairs, weights=weights, b=b, s=s, ds_down=ds_down, bits=words
    )
    fp32 = torch.float32
    r = 0 if b is None else b.shape[2]
    r_down = 0 if ds_down is None else ds_down.shape[1]
    out = ExpertsGateGrads(
        gu.new_empty((P, N)),
        gu.new_empty(P, dtype=fp32),
        None if b is None else gu.new_empty((P, r)),
        None if s is None else gu.new_empty((route.experts, N, r), dtype=fp32),
        None if ds_down is None else gu.new_empty((route.experts, r_down, K), dtype=fp32),
    )
    if P == 0 or K == 0:
        for t in (out.dw, out.ds, out.db, out.da):
            if t is not None:
                t.zero_()
        return out
    arch = arch_of(gu.device)
    if config is None:
        itemsize = gu.element_size()
        of_pass = r_down if fits(r, s is not None, r_down, arch, itemsize) else 0
        config = default_config(r, layout, arch, itemsize, of_pass)
    for launch in plan_gate_grad(
        dh0, gu, route, name, layout, weights, b, s, scale, clamp, ds_down, words, out, config, arch
    ):
        launch.run()
    return out
