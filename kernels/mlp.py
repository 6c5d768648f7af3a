"""H = act(G) ∘ U of an MLP, and the S of the adapter that reads H, in one pass.

G (gate's output), U (up's output) and H [M, K], where K is the number of inputs of down; A [r, K];
S [M, r] = scale * (mask H) Aᵀ. Without U, H = act(G). H is rounded before S is made of it, so the
numbers are those of the separate operations, but H is not read again. The sum over K is split over
programs; a second kernel adds their fp32 partials in fixed order (no atomics). Where down's base
product takes H in fp8, the pass writes that (:mod:`.fp8_rows`) and not H; and where the products
of G and U were in fp8, it adds their low-rank parts (:mod:`.mlp_low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks, fp8_rows, mlp_low_rank
from .bits import DRAWN, ROUNDS, Draw, drawn_tile, seed_of
from .common import (
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
from .launching import planned
from .mlp_arguments import check
from .mlp_low_rank import left_rows, plus, right_columns
from .reduce import plan_sum
from .shrink import LAUNCH_RANK, drawn_in, masks_to_fill, plan_shrink
from .shrink import default_config as default_shrink_config

ADDED_RANK = 64  # of gate's and up's low-rank parts that the pass adds
# of a pass that writes an fp8 copy, with a mask and low-rank parts; fewer rows read A more often
_SPILLS_WITH_32 = tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)


@dataclass(frozen=True)
class MlpConfig:
    """Tiles of G [block_m, block_k]; K is split into split_k parts."""

    block_m: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_k=self.split_k)


def fits(r: int) -> bool:
    """True when the pass that makes H can make S of rank r; else S is a pass of its own over H."""
    return r <= LAUNCH_RANK


def default_config(
    M: int,
    K: int,
    r: int,
    arch: Arch,
    itemsize: int = 2,
    copied: bool = False,
    crowded: bool = False,
) -> MlpConfig:
    """A config with as many programs as fit the device; r is 0 without an adapter.

    Exponentials and roundings take about as long as the copies, so there must be many warps. K is
    split for them, into parts of at least 512, because partials of S are small. With an fp8 copy
    (``copied``) tiles are as wide as what shares a scale. ``crowded``: beside it are a mask and
    low-rank parts of G and U.
    """
    # Fewer rows where 64 spill, or where on sm_100 they would make the product one of tcgen05,
    # whose operands pass through registers.
    small = arch.blackwell or arch.shared <= 160_000 or itemsize == 4
    tall = 32 if r == 0 or (r <= 32 and small) or (r > 64 and not arch.warpgroups) else 64
    rows = 16 if crowded and _SPILLS_WITH_32 else 32
    block_m = min(rows if copied else tall, max(16, next_pow2(M)))
    warps = 8 if r > 32 or copied else 4
    slots = arch.sms * (16 // warps)
    return MlpConfig(
        block_m=block_m,
        block_k=fp8_rows.WIDTH if copied else 64,
        split_k=max(1, min(slots // cdiv(M, block_m), K // 512)),
        num_warps=warps,
    )


# ------------------------------------------------------------------------------------- activations


@device_function
def _one_plus_exp(x, ACT: tl.constexpr):
    """1 + exp(-x) for silu; for gelu_tanh 1 + exp(-2 y) with its y = √(2 / π) (x + 0.044715 x³).

    The inverse of the latter is (1 + tanh(y)) / 2, but loses no digits where tanh is near -1.
    """
    if ACT == "silu":
        z = -x
    else:
        z = -1.5957691216057308 * (x + 0.044715 * x * x * x)
    return 1.0 + tl.exp(z)


@device_function
def activation(x, ACT: tl.constexpr):
    """act(x) in fp32 for a tile in fp32."""
    if ACT == "silu" or ACT == "gelu_tanh":
        y = x / _one_plus_exp(x, ACT)
    elif ACT == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.where(x <= 0.0, 0.0, x)  # keeps NaN, as torch's relu
        if ACT == "relu2":
            y = y * y
    return y


@device_function
def both(x, ACT: tl.constexpr):
    """(act(x), act'(x)) in fp32 for a tile in fp32; at its corner relu has slope 0, as in torch."""
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        y, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(z))
        positive = 1.0 / (1.0 + e)  # sigmoid(|z|); that of -|z| is e times it, where 1 - s has none
        s = tl.where(z < 0.0, e * positive, positive)  # of the digits
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        y, slope = x * s, s + x * e * positive * positive * inner
    else:
        y, slope = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
        if ACT == "relu2":
            y, slope = y * y, 2.0 * y
    return y, slope


# ------------------------------------------------------------------------------------------ kernel


@triton.jit(
    do_not_specialize=["M", *DRAWN],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def _mlp_kernel(
    gate, up, h, a, words, s, scale, M, K, R, K_PART,
    gate_stride, up_stride, h_stride, a_r_stride, a_k_stride, s_part_stride, WORDS,
    q, q_scales, q_stride, q_scales_stride,
    Ls, Rs, l_ranks, l_strides, l_k_strides, l_r_strides,
    seed_ptr, seed_lo, seed_hi, threshold, fraction,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    DIGITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = row < M  # [BLOCK_M]
    row64 = row.to(tl.int64)  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    first = part * K_PART
    last = tl.minimum(first + K_PART, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    seed = 0
    if DIGITS > 0:
        seed = seed_of(seed_ptr, seed_lo, seed_hi)
    lows = ()  # each [BLOCK_M, BLOCK_L]
    for i in tl.static_range(len(l_ranks)):
        low = acc
        if Ls[i] is not None:
            low = left_rows(Ls[i], l_strides[i], l_ranks[i], row64, row_ok, BLOCK_L)
        lows = lows + (low,)  # type: ignore[assignment]
    # the number of stages stands here because a loop without products is not pipelined otherwise
    for k0 in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < last  # [BLOCK_K]
        ok = row_ok[:, None] & k_ok[None, :]  # [BLOCK_M, BLOCK_K]
        g = tl.load(
            gate + row64[:, None] * gate_stride + k[None, :], mask=ok, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        if Ls[0] is not None:
            right = right_columns(
                Rs[0], l_r_strides[0], l_k_strides[0], l_ranks[0], k.to(tl.int64), k_ok, g.dtype,
                BLOCK_L,
            )  # fmt: skip
            g = plus(g, lows[0], right, PRECISION)  # type: ignore[misc]
        value = cast(activation(g.to(tl.float32), ACT), g.dtype)  # [BLOCK_M, BLOCK_K]
        if up is not None:
            u = tl.load(
                up + row64[:, None] * up_stride + k[None, :], mask=ok, other=0.0
            )  # [BLOCK_M, BLOCK_K]
            if Ls[1] is not None:
                right = right_columns(
                    Rs[1], l_r_strides[1], l_k_strides[1], l_ranks[1], k.to(tl.int64), k_ok,
                    g.dtype, BLOCK_L,
                )  # fmt: skip
                u = plus(u, lows[1], right, PRECISION)  # type: ignore[misc]
            value = cast(value.to(tl.float32) * u.to(tl.float32), g.dtype)
        if h is not None:
            tl.store(h + row64[:, None] * h_stride + k[None, :], value, mask=ok)
        if q is not None:
            write_fp8(value, q, q_scales, q_stride, q_scales_stride, row, row_ok, k0)
        if a is not None:
            a_tile = tl.load(
                a + rank.to(tl.int64)[None, :] * a_r_stride + k.to(tl.int64)[:, None] * a_k_stride,
                mask=(rank < R)[None, :] & k_ok[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            kept = value
            if words is not None:
                if DIGITS > 0:
                    keep = drawn_tile(
                        words, row, row_ok, k0, WORDS, seed, K,
                        threshold, fraction, DIGITS, ROUNDS, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
                else:
                    keep = keep_tile(words, row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                kept = tl.where(keep, value, 0.0).to(g.dtype)  # [BLOCK_M, BLOCK_K]
            acc = dot(kept, cast(a_tile, g.dtype), acc, PRECISION)
    if a is not None:
        tl.store(
            s + part.to(tl.int64) * s_part_stride + row64[:, None] * R + rank[None, :],
            cast(acc * scale, s.dtype.element_ty),
            mask=row_ok[:, None] & (rank < R)[None, :],
        )


def plan_mlp(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    act: str,
    h: torch.Tensor | None,
    a: torch.Tensor | None,
    words: torch.Tensor | None,
    scale: float,
    s: torch.Tensor | None,
    config: MlpConfig,
    copy: Fp8Rows | None = None,
    inner: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = (None, None),
    draw: Draw | None = None,
) -> list[Launch]:
    """Launches that fill h [M, K], ``copy`` with it in fp8, and with ``a`` [r, K] s [M, r].

    h and s are contiguous. ``inner``: S and B of gate and up, of which G and U have no part yet.
    With ``draw`` the words are filled too.

    The arguments are checked already, and the rank fits.
    """
    M, K = gate.shape
    drawn, digits = drawn_in(draw, gate.device)
    # parts are whole tiles, so that no mask word is split
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split, r = cdiv(K, k_part), 1 if a is None else a.shape[0]
    parts = s if s is None or split == 1 else s.new_empty((split, M, r), dtype=torch.float32)
    args = (
        gate, up, h, a, words, parts, float(scale), M, K, r, k_part,
        row_stride(gate), 0 if up is None else row_stride(up), 0 if h is None else row_stride(h),
        0 if a is None else a.stride(0), 0 if a is None else a.stride(1), M * r, cdiv(K, 32),
        *fp8_rows.arguments(copy), *mlp_low_rank.arguments(inner), *drawn,
    )  # fmt: skip
    meta = dict(
        ACT=act, BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=padded(r),
        BLOCK_L=padded(*(1 if pair is None else pair[1].shape[1] for pair in inner)),
        PRECISION=precision(gate.dtype), STAGES=config.num_stages, DIGITS=digits, ROUNDS=ROUNDS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_mlp_kernel, (cdiv(M, config.block_m), split), args, meta)]
    if s is not None and parts is not None and parts is not s:
        launches.append(plan_sum([(parts, s)]))
    return launches


@planned("scale", seeds=["draw"])
def mlp(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    act: str = "silu",
    a: torch.Tensor | None = None,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    *,
    draw: Draw | None = None,
    copy: Fp8Rows | None = None,
    inner: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = (None, None),
    config: MlpConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(H [M, K], S [M, r] or None without ``a``), both in gate's dtype.

    gate, up [M, K] fp16/bf16/fp32, any row stride, up of gate's dtype or None; act: one of
    :data:`.mlp_arguments.ACTIVATIONS`; a [r, K] fp32 or gate's dtype, any strides, r from 1 to 256
    (above 128 H is read again for S); bits: packed keep mask int32 [M, ceil(K / 32)], with ``draw``
    to be filled by the launch, for ranks that it can hold (:func:`fits`); scale must include
    1 / (1 - p). ``copy``: room for H in fp8, which is written in place of H, for which None
    is returned then; K is a multiple of 128, and block_k of a config 128. ``inner``: (S [M, r],
    B [K, r]) of gate's and up's adapter, S in gate's dtype, B in it or fp32, where G and U are
    without S Bᵀ, which is added; r is at most 64. Errors: TypeError or ValueError naming the
    argument, before any launch.
    """
    gate, up = check(gate, up, act)
    inner = mlp_low_rank.check(inner, gate, up, ADDED_RANK)
    M, K = gate.shape
    if a is None and bits is not None:
        raise ValueError("bits is given without a; allowed: a mask for the adapter that reads H")
    if a is not None:
        checks.ranks("a", [a])
        [a] = checks.adapters("a", [a], [(None, K)], "gate has K columns", gate.dtype)
    if draw is not None:
        masks_to_fill([bits], draw, [] if a is None else [a.shape[0]])
    [words] = checks.masks(bits, 1, M, K)
    checks.device(
        gate=gate,
        up=up,
        a=a,
        bits=words,
        copy=copy,
        inner=[t for pair in inner for t in pair or ()],
    )
    arch = arch_of(gate.device)
    fp8_rows.check("copy", copy, (M, K), arch)
    fused = a is None or fits(a.shape[0])
    h = None if copy is not None and fused else gate.new_empty((M, K))
    s = None if a is None else gate.new_empty((M, a.shape[0]))
    if M == 0 or K == 0:
        return h, None if s is None else s.zero_()
    if config is None:
        r = a.shape[0] if a is not None and fused else 0
        copied = copy is not None and fused
        crowded = words is not None and any(pair is not None for pair in inner)
        config = default_config(M, K, r, arch, gate.element_size(), copied, crowded)
    if h is None or a is None or s is None or fused:
        fp8_rows.check_width("config.block_k", config.block_k, copy)
        launches = plan_mlp(gate, up, act, h, a, words, scale, s, config, copy, inner, draw)
    else:
        launches = plan_mlp(gate, up, act, h, None, None, 1.0, None, config, None, inner)
        ranks, size, copied = [a.shape[0]], h.element_size(), copy is not None
        shrink_config = default_shrink_config(M, K, ranks, arch, size, copied=copied)
        launches += plan_shrink(h, [a], [words], [scale], s, shrink_config, copy=copy)
    for launch in launches:
        launch.run()
    return None if copy is not None else h, s
