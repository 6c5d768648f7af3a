"""Low-rank parts that the kernels of an MLP's step add to the tiles they read.

torch's product in fp8 adds to nothing, so without this a pass would read and write G, U and dH
alone to add L R to them:

    G + S Bᵀ, U + S Bᵀ [M, K]        dH + mask (dS A) [M, K]

The sum is rounded to the tile's dtype, as that pass would round it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

from . import checks
from .common import cast, device_function, dot, row_stride
from .mlp_arguments import MlpMember


@device_function
def left_rows(left, left_stride, R, row64, row_ok, BLOCK_R: tl.constexpr):
    """The rows [M, BLOCK_R] of L that belong to a tile."""
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    ok = row_ok[:, None] & (rank < R)[None, :]  # [M, BLOCK_R]
    return tl.load(left + row64[:, None] * left_stride + rank[None, :], mask=ok, other=0.0)


@device_function
def right_columns(r, r_stride, n_stride, R, k64, k_ok, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr):
    """The columns [BLOCK_R, K] of R that belong to a tile, in DTYPE."""
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    ok = (rank < R)[:, None] & k_ok[None, :]  # [BLOCK_R, K]
    at = r + k64[None, :] * n_stride + rank.to(tl.int64)[:, None] * r_stride
    return cast(tl.load(at, mask=ok, other=0.0), DTYPE)


@device_function
def plus(x, left, right, PRECISION: tl.constexpr):
    """x [M, K] + left right, in x's dtype; left [M, BLOCK_R], right [BLOCK_R, K]."""
    return cast(dot(left, right, x.to(tl.float32), PRECISION), x.dtype)


def check(
    inner: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    gate: torch.Tensor,
    up: torch.Tensor | None,
    most: int,
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(S [M, r], B [K, r]) of gate's and up's adapter, or None, checked; r is at most ``most``."""
    (M, K), dtype = gate.shape, gate.dtype
    if len(inner) != 2:
        raise ValueError(f"inner has {len(inner)} entries; allowed: 2, for gate and for up")
    if up is None and inner[1] is not None:
        raise ValueError("inner[1] is given without up; allowed: None")
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for i, pair in enumerate(inner):
        if pair is not None:
            s, b = pair
            s = checks.rows(f"inner[{i}][0]", s, (dtype,))
            checks.matrix(f"inner[{i}][1]", b)
            r = b.shape[1]
            if not 1 <= r <= most:
                raise ValueError(f"inner[{i}][1] has rank {r}; allowed: from 1 to {most}")
            checks.shape(f"inner[{i}][0]", s, (M, r), "[rows of gate, columns of B]")
            checks.shape(f"inner[{i}][1]", b, (K, r), "[columns of gate, rank]")
            checks.adapter_dtype(f"inner[{i}][1]", b, dtype)
            pair = s, b
        found.append(pair)
    return found


def check_grad(
    a: torch.Tensor | None,
    add: bool,
    members: Sequence[MlpMember | None],
    ds: torch.Tensor | None,
    gate: torch.Tensor,
    fits: Callable[[int, int], bool],
) -> torch.Tensor | None:
    """``a`` [r, K] of down, checked, where the pass for the gradients adds low-rank parts.

    ``fits`` is asked for the largest rank and the bytes of an element.
    """
    if a is None and not add:
        return None
    held = [m.b.shape[1] for m in members if m is not None]
    ranks = [*held, *([] if ds is None else [ds.shape[1]])]
    if not fits(max(ranks, default=0), gate.element_size()):
        raise ValueError(
            f"a or add is given for ranks {ranks} in {gate.dtype}; allowed: up to 16 in two bytes"
        )
    if add and any(m is not None and m.s is None for m in members):
        raise ValueError("add is given, and a member has no s; allowed: S of every member")
    if a is None:
        return None
    if ds is None:
        raise ValueError("a is given without ds; allowed: dS of down")
    shape = ds.shape[1], gate.shape[1]
    return checks.adapters("a", [a], [shape], "[columns of ds, columns of gate]", gate.dtype)[0]


def arguments(pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> tuple[Any, ...]:
    """Tuples of the L [M, r], the R [K, r], ranks, and the strides of L's rows and R's two."""
    Ls, Rs, ranks, rows, columns, deep = [], [], [], [], [], []
    for pair in pairs:
        left, right = (None, None) if pair is None else pair
        Ls.append(left)
        Rs.append(right)
        ranks.append(0 if right is None else right.shape[1])
        rows.append(0 if left is None else row_stride(left))
        columns.append(0 if right is None else right.stride(0))
        deep.append(0 if right is None else right.stride(1))
    return tuple(Ls), tuple(Rs), tuple(ranks), tuple(rows), tuple(columns), tuple(deep)
