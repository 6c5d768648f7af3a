"""The fused GEMM: base product and low-rank part in one accumulator, forward and backward.

    Y  [M, N] = X Wᵀ + S Bᵀ + bias
    dX [M, K] = sum over a group of dY_i W_i + mask_i * (dS_i A_i)

Both are out = sum_i X_i W_iᵀ + mask_i * (L_i R_i) + bias, where W_i is [N, K] or [K, N] by its
strides. With DoRA's gain the forward is Y = gain * (V - bias) + bias; V is that sum, and is stored
too if the backward needs it. The mask is read as packed bits.

The low-rank part comes after the loop over K, into the same accumulator. With a mask it comes
first, as its second accumulator would otherwise be live together with the first; so it does on
sm_100, where a second product into an accumulator in flight does not compile.

Loops are not flattened unless a config asks for it: of a flattened one, ptxas of Triton 3.6 runs
the products of sm_90 one by one, as it sees the accumulator start anew in the middle of the loop.

With ``tma`` tiles are loaded through tensor descriptors (bulk copies) and the grid is persistent.
Without it they are loaded through pointers: for sm_80, for operands with unaligned rows or base,
which a descriptor cannot describe, and for more than four pairs of X and W. Each descriptor is an
argument of its own, as launchers of Triton 3.6 find none inside a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks
from .common import (
    Arch,
    Launch,
    add_low_rank,
    arch_of,
    cast,
    cdiv,
    dot,
    precision,
    rank_end,
    row_stride,
)  # fmt: skip
from .launching import planned

MAX_DESCRIBED = 4  # pairs of X and W that the kernel has arguments for


@dataclass(frozen=True)
class GemmConfig:
    """Output tile [block_m, block_n], step block_k, low-rank chunk block_r, and way of loading.

    ``group_m``: rows of tiles that are walked together (for L2); ``flatten``: one loop for all,
    so that copies of the next tile run during the end of one; not where the low-rank part is first.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    block_r: int = 16
    group_m: int = 8
    tma: bool = False
    flatten: bool = False
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_k=self.block_k, block_r=self.block_r)
        checks.blocks(self, low=32, block_n=self.block_n)  # whole mask words
        if self.group_m < 1:
            raise ValueError(f"GemmConfig.group_m is {self.group_m}; allowed: 1 or more")

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes for the pipeline of X and W tiles.
        The compiler adds a little, and with ``tma`` the output tile."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


def default_config(
    M: int,
    N: int,
    arch: Arch,
    *,
    group: int = 1,
    masked: bool = False,
    gain: bool = False,
    itemsize: int = 2,
) -> GemmConfig:
    """A config with the best tile for the architecture's matrix unit.

    It is narrower if a masked group needs a second accumulator, or a gain the registers of one.
    """
    block_m = 128 if M > 64 else 64
    if itemsize == 4:
        # exact products keep operands in registers, which spill on 4 warps (sm_80, Triton 3.9)
        return GemmConfig(64, 64, 32, num_warps=8, num_stages=3)
    if arch.capability in (90, 100) and block_m == 128:
        if gain or (masked and group > 1):
            return GemmConfig(128, 128, 64, tma=True)
        return GemmConfig(128, 256 if N >= 256 else 128, 64, tma=True)
    return GemmConfig(
        block_m,
        64 if masked and group > 1 else 128,
        32 if arch.shared < 160_000 and arch.capability < 120 else 64,
        tma=arch.capability >= 90,
        num_warps=8 if block_m == 128 else 4,
    )


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    y, v, x0, x1, x2, x3, w0, w1, w2, w3,
    xs, ws, Ls, Rs, words, bias, gain, ranks, l_strides, r_strides, n_strides,
    M, N, Ks, x_strides, w_n_strides, w_k_strides, y_stride, WORDS, RANK_END,
    G: tl.constexpr, TMA: tl.constexpr, W_KN: tl.constexpr, FLATTEN: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x_tiles, w_tiles = (x0, x1, x2, x3), (w0, w1, w2, w3)  # descriptors, with TMA
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # GROUP_M rows of tiles are walked column by column, so that W tiles are read again while
        # they are in L2
        band = tile // (GROUP_M * tiles_n)
        in_band = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        pid_m = band * GROUP_M + (tile % (GROUP_M * tiles_n)) % in_band
        pid_n = (tile % (GROUP_M * tiles_n)) // in_band
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)  # [BLOCK_M], [BLOCK_N]
        row_ok, col_ok = row < M, col < N  # [BLOCK_M], [BLOCK_N]
        row64, col64 = row.to(tl.int64), col.to(tl.int64)  # [BLOCK_M], [BLOCK_N]

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if LOW_FIRST:
            acc = add_low_rank(
                acc, Ls, Rs, words, ranks, l_strides, r_strides, n_strides, row, col, row_ok,
                col_ok, n0, WORDS, RANK_END, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip

        for i in tl.static_range(G):
            for k0 in range(0, Ks[i], BLOCK_K):
                if TMA:
                    x_tile = x_tiles[i].load([m0, k0])  # [BLOCK_M, BLOCK_K]
                    if W_KN:
                        w_tile = w_tiles[i].load([k0, n0])  # [BLOCK_K, BLOCK_N]
                    else:
                        w_tile = tl.trans(w_tiles[i].load([n0, k0]))  # [BLOCK_K, BLOCK_N]
                else:
                    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                    k_ok = k < Ks[i]  # [BLOCK_K]
                    x_tile = tl.load(
                        xs[i] + row64[:, None] * x_strides[i] + k[None, :],
                        mask=row_ok[:, None] & k_ok[None, :],
                        other=0.0,
                    )  # [BLOCK_M, BLOCK_K]
                    w_tile = tl.load(
                        ws[i]
                        + k.to(tl.int64)[:, None] * w_k_strides[i]
                        + col64[None, :] * w_n_strides[i],
                        mask=k_ok[:, None] & col_ok[None, :],
                        other=0.0,
                    )  # [BLOCK_K, BLOCK_N]
                acc = dot(x_tile, w_tile, acc, PRECISION)

        if not LOW_FIRST:
            acc = add_low_rank(
                acc, Ls, Rs, words, ranks, l_strides, r_strides, n_strides, row, col, row_ok,
                col_ok, n0, WORDS, RANK_END, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if gain is not None:
            if v is not None:
                if TMA:
                    v.store([m0, n0], cast(acc, v.dtype))
                else:
                    tl.store(
                        v + row64[:, None] * N + col[None, :],
                        cast(acc, v.dtype.element_ty),
                        mask=row_ok[:, None] & col_ok[None, :],
                    )
            factor = tl.load(gain + col, mask=col_ok, other=0.0)  # [BLOCK_N]
            acc = acc * factor[None, :]
            if bias is not None:
                shift = tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)  # [BLOCK_N]
                acc += (shift * (1 - factor))[None, :]
        if TMA:
            y.store([m0, n0], cast(acc, y.dtype))
        else:
            tl.store(
                y + row64[:, None] * y_stride + col[None, :],
                cast(acc, y.dtype.element_ty),
                mask=row_ok[:, None] & col_ok[None, :],
            )


def _describable(t: torch.Tensor) -> bool:
    """True when a tensor descriptor can describe ``t``: inner stride 1, 16-byte base and rows."""
    return (
        t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
    )


def plan_gemm(
    y: torch.Tensor,
    xs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    Ls: Sequence[torch.Tensor],
    Rs: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    arch: Arch,
    config: GemmConfig,
    gain: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> list[Launch]:
    """The launch that fills ``y`` [M, N], and with gain [N] fp32 also ``v`` [M, N] contiguous.

    xs[i] [M, K_i], ws[i] [N, K_i] any strides, Ls[i] [M, r_i], Rs[i] [r_i, N]; all are checked
    already. Pointers are used if an operand cannot have a descriptor.
    """
    M, N = y.shape
    w_kn = all(w.stride(1) != 1 and w.stride(0) == 1 for w in ws)
    tma = (
        config.tma
        and len(xs) <= MAX_DESCRIBED
        and all(
            _describable(t)
            for t in (y, *([] if v is None else [v]), *xs, *((w.T for w in ws) if w_kn else ws))
        )
    )
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    ranks = [r.shape[0] for r in Rs]
    args = (
        _described(y, config.block_m, config.block_n) if tma else y,
        _described(v, config.block_m, config.block_n) if tma and v is not None else v,
        *(_each([_described(x, config.block_m, config.block_k) for x in xs] if tma else [])),
        *(_each([_weight(w, w_kn, config) for w in ws] if tma else [])),
        () if tma else tuple(xs), () if tma else tuple(ws),
        tuple(Ls), tuple(Rs), tuple(words), bias, gain, tuple(ranks),
        tuple(row_stride(v) for v in Ls),
        tuple(r.stride(0) for r in Rs), tuple(r.stride(1) for r in Rs),
        M, N, tuple(x.shape[1] for x in xs), tuple(row_stride(x) for x in xs),
        tuple(w.stride(0) for w in ws), tuple(w.stride(1) for w in ws),
        row_stride(y), cdiv(N, 32), rank_end(ranks, config.block_r),
    )  # fmt: skip
    low_first = arch.blackwell or any(word is not None for word in words)
    meta = dict(
        # what comes before the loop over K would be a branch in it, and such a loop waits for each
        # of its copies
        G=len(xs), TMA=tma, W_KN=w_kn, FLATTEN=config.flatten and not low_first,
        LOW_FIRST=low_first,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m, PRECISION=precision(xs[0].dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [Launch(_gemm_kernel, (min(tiles, arch.sms) if tma else tiles,), args, meta)]


def _each(descriptors: list[TensorDescriptor]) -> list[TensorDescriptor | None]:
    """As many arguments as the kernel has for descriptors."""
    return [*descriptors, *[None] * (MAX_DESCRIBED - len(descriptors))]


def _described(t: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], list(block))


def _weight(w: torch.Tensor, w_kn: bool, config: GemmConfig) -> TensorDescriptor:
    if w_kn:
        return _described(w.T, config.block_k, config.block_n)
    return _described(w, config.block_n, config.block_k)


def _fused(
    xs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    Ls: Sequence[torch.Tensor],
    Rs: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    config: GemmConfig | None,
    gain: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plan and run with checked arguments on one device; returns Y [M, N]."""
    M, N = xs[0].shape[0], ws[0].shape[0]
    y = xs[0].new_empty((M, N))
    if not y.numel():
        return y
    arch = arch_of(y.device)
    if config is None:
        masked = any(w is not None for w in words)
        config = default_config(
            M, N, arch, group=len(Ls), masked=masked, gain=gain is not None,
            itemsize=y.element_size(),
        )  # fmt: skip
    if config.shared_bytes(y.element_size()) > arch.shared:
        raise ValueError(
            f"config needs {config.shared_bytes(y.element_size())} bytes of shared memory; "
            f"allowed: {arch.shared} here"
        )
    for launch in plan_gemm(y, xs, ws, Ls, Rs, words, bias, arch, config, gain, v):
        launch.run()
    return y


def _check_weight(
    name: str, w: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, why: str
) -> None:
    checks.matrix(name, w)
    checks.shape(name, w, shape, why)
    if w.dtype != dtype:
        raise TypeError(f"{name} has dtype {w.dtype}; allowed: {dtype}, that of the activation")


@planned()
def fused_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    gain: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Y [M, N] in x's dtype = x Wᵀ + S Bᵀ + bias, in one launch.

    With ``gain`` [N] fp32 this sum is V, and Y = gain * (V - bias) + bias; ``v`` [M, N], contiguous
    and of x's dtype, is filled with V. x [M, K] fp16/bf16/fp32, any row stride; w [N, K] x's dtype,
    any strides (Conv1D's [K, N]: pass its transpose); s [M, r] x's dtype, with the scale in it;
    b [N, r] fp32 or x's dtype, any strides; r from 1 to 256; bias [N]. Errors: TypeError,
    ValueError, before any launch."""
    x = checks.rows("x", x)
    M, K = x.shape
    checks.matrix("w", w)
    N = w.shape[0]
    _check_weight("w", w, (N, K), x.dtype, "[N, K], K as x")
    if (s is None) != (b is None):
        raise ValueError("s and b: allowed: both, or neither")
    Ls, Rs = [], []
    if s is not None and b is not None:
        s = checks.rows("s", s, (x.dtype,))
        checks.rank("s", s.shape[1])
        checks.shape("s", s, (M, s.shape[1]), "x has M rows")
        checks.matrix("b", b)
        checks.shape("b", b, (N, s.shape[1]), "[rows of w, columns of s]")
        checks.adapter_dtype("b", b, x.dtype)
        Ls, Rs = [s], [b.T]
    if bias is not None:
        checks.shape("bias", bias, (N,), "w has N rows")
        bias = bias.contiguous()
    if gain is not None:
        checks.shape("gain", gain, (N,), "w has N rows")
        if gain.dtype != torch.float32:
            raise TypeError(f"gain has dtype {gain.dtype}; allowed: torch.float32")
        gain = gain.contiguous()
    if v is not None:
        checks.shape("v", v, (M, N), "[rows of x, rows of w]")
        if gain is None or v.dtype != x.dtype or not v.is_contiguous():
            raise ValueError("v: allowed: with gain, contiguous and of x's dtype")
    checks.device(x=x, w=w, s=s, b=b, bias=bias, gain=gain, v=v)
    return _fused([x], [w], Ls, Rs, [None] * len(Ls), bias, config, gain, v)


@planned()
def fused_grad_input(
    dys: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    ds: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """dX [M, K] in dY's dtype = sum over the group of dY_i W_i + mask_i * (dS_i A_i), one launch.

    dys[i] [M, N_i] fp16/bf16/fp32, any row stride; ws[i] [N_i, K] the same dtype, any strides;
    ds[j] [M, r_j] the same dtype and As[j] [r_j, K] fp32 or that dtype, for each adapter (a
    projection may have none); bits: packed keep masks int32 [M, ceil(K / 32)], one for all adapters
    or one (or None) for each. Errors: TypeError, ValueError.
    """
    dys = [checks.rows(f"dys[{i}]", d) for i, d in enumerate(dys)]
    ws, As = list(ws), list(As)
    checks.counts(dys=dys, ws=ws)
    if len(ds) != len(As):
        raise ValueError(f"ds has {len(ds)} entries, As {len(As)}; allowed: equal counts")
    M, dtype = dys[0].shape[0], dys[0].dtype
    checks.matrix("ws[0]", ws[0])
    K = ws[0].shape[1]
    for i, (d, w) in enumerate(zip(dys, ws, strict=True)):
        if d.dtype != dtype:
            raise TypeError(f"dys[{i}] has dtype {d.dtype}; allowed: {dtype}, that of dys[0]")
        checks.shape(f"dys[{i}]", d, (M, d.shape[1]), "M rows as dys[0]")
        _check_weight(f"ws[{i}]", w, (d.shape[1], K), dtype, "[columns of dys[i], K]")
    ds = checks.low_rank("ds", ds, M, dtype, "M rows as dys[0]")
    shapes = [(d.shape[1], K) for d in ds]
    As = checks.adapters("As", As, shapes, "[columns of ds[{i}], K]", dtype)
    words = checks.masks(bits, len(As), M, K)
    checks.device(dys=dys, ws=ws, ds=ds, As=As, bits=words)
    return _fused(dys, [w.T for w in ws], ds, As, words, None, config)
