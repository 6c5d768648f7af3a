"""Decoding: Y = X Wᵀ + scale * (X Aᵀ) Bᵀ + bias for M <= 16 rows, alone or for a group on one X.

Two launches: one makes S of all projections, which reads each A once (:mod:`.decode_shrink`); in
the other every program streams its rows of one W and adds S Bᵀ at the end (:mod:`.decode_tile`).
Where A is small beside W one launch does both, and its programs make S again.

The second launch starts while the first runs (programmatic dependent launch, from compute
capability 9.0 on) and waits for it only before it reads S. W, A, B, X and the bias are read before
that wait, so whatever wrote them must have ended: therefore the first launch is an ordinary one,
which starts after all earlier work of its stream, and nothing but S is younger than that.

Only outputs and S are allocated and nothing syncs, so a CUDA graph can capture the launches. For
batches whose rows name different adapters see :mod:`.mixed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .common import (
    Arch,
    Launch,
    arch_of,
    cdiv,
    next_pow2,
    padded,
    precision,
    rank_end,
    row_stride,
    starts_early,
)
from .decode_shrink import plan_parts
from .decode_tile import _gemv_kernel, _rows_kernel
from .launching import planned

MAX_ROWS = 16
# Ranks for which the registers suffice: of S that a program makes itself, and of a given S [M, r]
# that is added at a time.
HELD_RANK = 64
MOST_PARTS = 16  # of S; more would be read by every program
# Bytes of L2 traffic that a second launch is assumed to cost: about a microsecond of it. Modelled.
LAUNCH_BYTES = 4_000_000
_TILE_BYTES = 16384  # of W that a program loads at a time


@dataclass(frozen=True)
class DecodeConfig:
    """Outputs of a program (block_n), and the part of K that it reads at a time (block_k).

    ``split_k`` is the number of parts of K in the launch that makes S; 0 is for no such launch:
    then every program makes S.
    """

    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 2

    def __post_init__(self) -> None:
        checks.blocks(self, low=1, block_n=self.block_n)
        checks.blocks(self, block_k=self.block_k)
        if not 0 <= self.split_k <= MOST_PARTS:
            raise ValueError(
                f"DecodeConfig.split_k is {self.split_k}; allowed: 0 to {MOST_PARTS}, 0 for one "
                "launch"
            )


def default_config(
    M: int,
    Ns: Sequence[int],
    K: int,
    ranks: Sequence[int],
    arch: Arch,
    itemsize: int = 2,
    adapter_itemsize: int = 4,
) -> DecodeConfig:
    """The widest block whose programs fill at least 0.9 of their waves, else the best filled one.

    A wave is a program on every multiprocessor. One launch, if its programs load at most
    LAUNCH_BYTES of A again; else parts of S over 2048 columns (one row) or 1024.
    """
    one_row, block_r = M == 1, padded(max(ranks))

    def programs(block: int) -> int:
        return sum(cdiv(n, block) for n in Ns)

    def fill(block: int) -> float:
        return programs(block) / (cdiv(programs(block), arch.sms) * arch.sms)

    widths = [64, 32, 16, 8, 4] if one_row else [64, 32, 16]
    block_n = next((n for n in widths if fill(n) >= 0.9), max(widths, key=fill))
    again = sum((cdiv(n, block_n) - 1) * r for n, r in zip(Ns, ranks, strict=True))
    alone = again * K * adapter_itemsize <= LAUNCH_BYTES
    # with several rows, a product of 64 ranks would be an asynchronous one that waits for W's
    alone = alone and max(ranks) <= (HELD_RANK if one_row else 32)
    most = 1024 if one_row else 256
    block_k = max(64, min(most, _TILE_BYTES // itemsize // block_n, next_pow2(K)))
    if alone:
        block_k = max(64, min(block_k, 8192 // block_r))  # registers for A's tile and its sums
    column = itemsize * (block_n + (1 if one_row else 16))  # bytes of a step
    column += adapter_itemsize * block_r if alone else 0
    while block_k > 32 and 2 * block_k * column > arch.shared // 2:  # two steps ahead at least
        block_k //= 2
    return DecodeConfig(
        block_n=block_n,
        block_k=block_k,
        # a copy of X's columns to shared memory takes at least 4 bytes a thread
        num_warps=8 if one_row and itemsize * block_k >= 1024 else 4,
        num_stages=max(2, min(5, 1 + arch.shared // 2 // (block_k * column))),
        split_k=0 if alone else min(MOST_PARTS, cdiv(K, 2048 if one_row else 1024)),
    )


def plan_decode(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    ws: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    s: torch.Tensor | None,
    biases: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    config: DecodeConfig,
    arch: Arch,
) -> list[Launch]:
    """The launches that fill ys[i] [M, N_i] (contiguous); the arguments are checked already.

    ``s`` [M, sum r_i], if given, has the scale in it and stands in for ``As``, which is then empty.
    """
    (M, K), G = x.shape, len(ys)
    ranks, Ns = tuple(b.shape[1] for b in Bs), tuple(y.shape[1] for y in ys)
    launches = []
    two = s is None and config.split_k > 0 and K > 0
    early = two and starts_early(x, arch)
    parts = s[None] if s is not None else None
    if two:
        parts, first = plan_parts(x, As, scales, config.split_k, early)
        launches.append(first)
    one_row = M == 1 and (parts is not None or max(ranks) <= HELD_RANK)
    block_n = config.block_n if one_row else max(16, config.block_n)
    tiles = [cdiv(n, block_n) for n in Ns]
    given = parts is not None
    args: tuple[Any, ...] = (
        tuple(ys), x, tuple(ws), (None,) * G if given else tuple(As), tuple(Bs), parts,
        tuple(biases), tuple(float(c) for c in scales),
        tuple(sum(tiles[:i]) for i in range(G)), Ns, ranks,
        tuple(sum(ranks[:i]) for i in range(G)),
        tuple(w.stride(0) for w in ws), tuple(w.stride(1) for w in ws),
        (0,) * G if given else tuple(a.stride(0) for a in As),
        tuple(b.stride(0) for b in Bs), tuple(b.stride(1) for b in Bs),
        K, M * sum(ranks),
    )  # fmt: skip
    meta: dict[str, Any] = dict(
        G=G, BLOCK_N=block_n, BLOCK_K=config.block_k, BLOCK_R=padded(max(ranks)),
        PARTS=0 if parts is None else parts.shape[0], EARLY=early,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if early:  # an option that only NVIDIA's compiler knows
        meta |= dict(launch_pdl=True)
    if one_row:
        kernel, meta = _gemv_kernel, meta | dict(STAGES=config.num_stages)
    else:
        s_stride = 0 if parts is None else row_stride(parts[0])
        chunk = min(HELD_RANK, padded(max(ranks))) if given else padded(max(ranks))
        end = rank_end([max(ranks)], chunk)
        kernel, args = _rows_kernel, (*args, M, end, row_stride(x), s_stride)
        meta |= dict(BLOCK_M=16, BLOCK_R=chunk, PRECISION=precision(x.dtype))
    return [*launches, Launch(kernel, (sum(tiles),), args, meta)]


def _member(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    names: tuple[str, str, str, str],
) -> None:
    """Check one projection of x [M, K]; ``names`` are those of w, a, b and bias in errors."""
    name_w = names[0]
    checks.matrix(name_w, w)
    N = w.shape[0]
    checks.shape(name_w, w, (N, x.shape[1]), "[N, K], K as x")
    if w.dtype != x.dtype:
        raise TypeError(f"{name_w} has dtype {w.dtype}; allowed: {x.dtype}, that of x")
    check_beside(x, N, a, b, bias, names)


def check_beside(
    x: torch.Tensor,
    N: int,
    a: torch.Tensor | None,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    names: tuple[str, str, str, str],
) -> None:
    """Check what stands beside a weight of N rows in a projection of x [M, K]."""
    K = x.shape[1]
    name_w, name_a, name_b, name_bias = names
    checks.matrix(name_b, b)
    r = b.shape[1]
    checks.rank(name_b, r)
    checks.adapter_dtype(name_b, b, x.dtype)
    checks.shape(name_b, b, (N, r), f"N rows as {name_w}")
    if a is not None:
        checks.matrix(name_a, a)
        checks.shape(name_a, a, (r, K), f"rank as {name_b}, K as x")
        checks.adapter_dtype(name_a, a, x.dtype)
    if bias is not None:
        checks.shape(name_bias, bias, (N,), f"{name_w} has N rows")


def _few(x: torch.Tensor) -> torch.Tensor:
    x = checks.rows("x", x)
    if x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"x has {x.shape[0]} rows; allowed: at most {MAX_ROWS} (use the gemm or expand kernels)"
        )
    return x


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy of it if its rows have no unit stride."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _run(
    x: torch.Tensor,
    ws: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    s: torch.Tensor | None,
    biases: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    config: DecodeConfig | None,
) -> list[torch.Tensor]:
    M, K = x.shape
    ys = [x.new_empty((M, w.shape[0])) for w in ws]
    if not any(y.numel() for y in ys):
        return ys
    arch = arch_of(x.device)
    if config is None:
        Ns, ranks = [w.shape[0] for w in ws], [b.shape[1] for b in Bs]
        sizes = x.element_size(), Bs[0].element_size()
        config = default_config(M, Ns, K, ranks, arch, *sizes)
    As, biases = (
        [dense_rows(a) for a in As],
        [None if c is None else c.contiguous() for c in biases],
    )
    for launch in plan_decode(ys, x, ws, As, Bs, s, biases, scales, config, arch):
        launch.run()
    return ys


@planned("scale")
def decode(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    *,
    s: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Y [M, N] in x's dtype = x Wᵀ + scale * (x Aᵀ) Bᵀ + bias, for M <= 16.

    x [M, K] fp16/bf16/fp32; w [N, K] x's dtype, any strides (for Conv1D's [K, N] pass its
    transpose); a [r, K], b [N, r] fp32 or x's dtype, r from 1 to 256; bias [N]. s [M, r] x's dtype,
    with the scale in it, is given in place of a. Errors: TypeError, ValueError, before any launch.
    """
    x = _few(x)
    if (a is None) == (s is None):
        raise ValueError("a and s: allowed: exactly one of them")
    _member(x, w, a, b, bias, ("w", "a", "b", "bias"))
    if s is not None:
        s = checks.rows("s", s, (x.dtype,))
        checks.shape("s", s, (x.shape[0], b.shape[1]), "[rows of x, rank]")
    checks.device(x=x, w=w, a=a, b=b, bias=bias, s=s)
    return _run(x, [w], [] if a is None else [a], [b], s, [bias], [float(scale)], config)[0]


@planned("scales")
def decode_group(
    x: torch.Tensor,
    ws: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    scales: float | Sequence[float] = 1.0,
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    config: DecodeConfig | None = None,
) -> list[torch.Tensor]:
    """Y_i [M, N_i] = x W_iᵀ + scale_i * (x A_iᵀ) B_iᵀ + bias_i of projections of one x, M <= 16.

    Shapes and dtypes of each are those of :func:`decode`; N_i, ranks, strides and which of them
    have a bias may differ. As many launches as one projection takes. Errors: TypeError or
    ValueError naming the argument, before any launch.
    """
    x = _few(x)
    ws, As, Bs = list(ws), list(As), list(Bs)
    checks.counts(ws=ws, As=As)
    checks.counts(ws=ws, Bs=Bs)
    biases = checks.per_adapter("biases", biases, len(ws))
    factors = checks.per_adapter("scales", scales, len(ws))
    for i, (w, a, b, bias) in enumerate(zip(ws, As, Bs, biases, strict=True)):
        _member(x, w, a, b, bias, (f"ws[{i}]", f"As[{i}]", f"Bs[{i}]", f"biases[{i}]"))
    checks.device(x=x, ws=ws, As=As, Bs=Bs, biases=biases)
    return _run(x, ws, As, Bs, None, biases, factors, config)
