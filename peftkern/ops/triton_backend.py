"""The LoRA linear on the Triton kernels of ``kernels/``; signatures as in :mod:`.torch_backend`.

What the kernels do not take (float64, ranks above 256, a CPU outside Triton's interpreter) goes to
the torch backend, and :func:`why_not` says so. Kernels run with the configs that a tuning table has
for this GPU, or else with their own defaults (:mod:`.tuned`).

The mask is a function of a seed drawn from torch's CPU generator, which gradient checkpointing
restores: the recomputed forward drops the same elements. It has the distribution of torch's
dropout, not its elements.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..kernels.bits import dropout_bits
from ..kernels.common import DTYPES, INTERPRET, MAX_RANK
from ..kernels.gemm import fused_grad_input, fused_linear
from ..kernels.outer import grad_a, grad_output
from ..kernels.shrink import shrink
from ..kernels.small import MAX_ROWS, decode
from ..kernels.write import expand, low_rank_grad_input
from . import torch_backend, tuned
from .device import capturing, on_its_device
from .projection import Part, Projection

# How the base product and the update come together:
#   hybrid   the low-rank part is written, the vendor's product accumulates onto it
#   fused    one kernel of ours does both
# An operation that is not told (``how=None``) takes ``product``; where that is None, the fastest in
# this GPU's tables, or else the first.
PRODUCTS = ("hybrid", "fused")
product: str | None = None
# without gradients, up to MAX_ROWS rows, there is also one launch for everything
INFER = ("small", *PRODUCTS)

_noted: set[str] = set()


def why_not(x: Tensor, A: Tensor) -> str | None:
    """Why a call with these tensors goes to the torch backend; None when the kernels take it."""
    return refusal(x, A.dtype, A.shape[0])


def refusal(x: Tensor, adapter: torch.dtype, r: int) -> str | None:
    """The same for adapters of this dtype and rank."""
    if not (x.is_cuda or INTERPRET.value):
        return f"the tensors are on {x.device.type}, and Triton's interpreter is off"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if r > MAX_RANK:
        return f"rank {r} is above {MAX_RANK}"
    if adapter not in (x.dtype, torch.float32):
        return f"adapters in {adapter} under {x.dtype}"
    return None


def _declines(x: Tensor, A: Tensor) -> bool:
    reason = why_not(x, A)
    if reason is not None and reason not in _noted:
        _noted.add(reason)
        logging.getLogger("peftkern").info("the Triton backend hands a call to torch: %s", reason)
    return reason is not None


def _seed(x: Tensor) -> int | Tensor:
    if capturing(x):
        # replays of a graph draw anew only from the device's own generator
        return torch.randint(2**62, (1,), device=x.device)
    return int(torch.randint(2**62, (1,)))


def words_of(x: Tensor, p: float) -> Tensor | None:
    """A new packed mask for x [M, K], None when ``p`` is 0."""
    return dropout_bits(*x.shape, p, _seed(x), device=x.device) if p > 0.0 else None


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    how: str | None = None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [M, N], S [M, r] and the packed mask, which is ``words`` where they are given; ``w`` is
    [K, N], ``how`` one of ``PRODUCTS``."""
    if _declines(x, A):
        return torch_backend.forward(x, w, bias, A, B, scale, p, words)
    given = [words if words is not None else words_of(x, p)]
    return group_forward(x, [Projection(w, bias, A, B, scale, p, True)], how, given)[0]


def backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor | None,
    bits: Tensor | None,
    scale: float,
    p: float,
    needs: tuple[bool, bool, bool],
    how: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX [M, K], dA [r, K], dB [N, r]; two calls with the same tensors agree bit for bit."""
    needs_x, needs_a, needs_b = needs
    part = Part(dy, w, A, B, s, bits, scale, p, needs_a, needs_b)
    dx, [(da, db)] = group_backward(x, [part], needs_x, how)
    return dx, da, db


@on_its_device
def group_forward(
    x: Tensor,
    members: list[Any],
    how: str | None = None,
    words: list[Tensor | None] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of several projections of one x [M, K], which the shrink reads once."""
    if any(_declines(x, m.A) for m in members):
        return torch_backend.group_forward(x, members, words)
    if words is None:
        words = [words_of(x, m.p) for m in members]
    masked = any(bits is not None for bits in words)
    K, low = x.shape[1], members[0].A.dtype
    ranks = [m.A.shape[0] for m in members]
    r, count = max(ranks), len(members)
    how = how or product
    if how is None:
        n = sum(m.B.shape[0] for m in members)
        how = tuned.best_of(PRODUCTS, "forward", x, low, n, K, r, count, masked) or PRODUCTS[0]
    side_by_side = shrink(
        x,
        [m.A for m in members],
        [m.scale / (1.0 - m.p) for m in members],
        words,
        config=tuned.config("shrink", x, low, 0, K, r, count, masked),
    )
    done = []
    for m, s, bits in zip(members, side_by_side.split(ranks, 1), words, strict=True):
        N, rank = m.B.shape
        if how == "fused":
            config = tuned.config("gemm", x, low, N, K, rank)
            y = fused_linear(x, m.w.t(), s, m.B, m.bias, config=config)
        else:
            config = tuned.config("expand", x, low, N, 0, rank)
            y = expand(s, m.B, m.bias, config=config).addmm_(x, m.w)
        done.append((y, s, bits))
    return done


@on_its_device
def group_backward(
    x: Tensor, parts: list[Any], needs_x: bool, how: str | None = None
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """One dX [M, K] for all projections, X read once for every dA, and (dA_i, dB_i) of each."""
    if any(_declines(x, part.A) for part in parts):
        return torch_backend.group_backward(x, parts, needs_x)
    K, low = parts[0].w.shape[0], parts[0].A.dtype
    ds: list[Tensor] = []
    dbs: list[Tensor | None] = []
    for part in parts:
        c = part.scale / (1.0 - part.p)
        N, rank = part.B.shape
        if part.needs_b and part.s is not None:
            config = tuned.config("outer", part.dy, low, N, 0, rank)
            d, db = grad_output(part.dy, part.B, part.s, c, config=config)
            dbs.append(db.to(part.B.dtype))
        else:
            config = tuned.config("shrink", part.dy, low, 0, N, rank)
            d = shrink(part.dy, [part.B.t()], c, config=config)
            dbs.append(None)
        ds.append(d)
    das: list[Tensor | None] = [None] * len(parts)
    wanted = [i for i, part in enumerate(parts) if part.needs_a]
    if wanted:
        bits = [parts[i].bits for i in wanted]
        r, masked = max(ds[i].shape[1] for i in wanted), any(b is not None for b in bits)
        config = tuned.config("grad_a", x, low, 0, K, r, len(wanted), masked)
        found = grad_a(x, [ds[i] for i in wanted], bits, config=config)
        for i, da in zip(wanted, found, strict=True):
            das[i] = da.to(parts[i].A.dtype)
    dx = None
    if needs_x:
        dx = _grad_input(parts, ds, _product_of(parts, how, needs_x))
    return dx, list(zip(das, dbs, strict=True))


def grads_of(parts: list[Any], needs_x: bool) -> str:
    """Which gradients a backward makes, as in the keys of tables: letters of "xab"."""
    return (
        ("x" if needs_x else "")
        + ("a" if any(part.needs_a for part in parts) else "")
        + ("b" if any(part.needs_b for part in parts) else "")
    )


def _product_of(parts: list[Any], how: str | None, needs_x: bool) -> str:
    if (how := how or product) is not None:
        return how
    dy, low, K = parts[0].dy, parts[0].A.dtype, parts[0].w.shape[0]
    n, r = sum(part.dy.shape[1] for part in parts), max(part.A.shape[0] for part in parts)
    masked = any(part.bits is not None for part in parts)
    grads = grads_of(parts, needs_x)
    best = tuned.best_of(PRODUCTS, "backward", dy, low, n, K, r, len(parts), masked, grads)
    return best or PRODUCTS[0]


def _grad_input(parts: list[Any], ds: list[Tensor], how: str) -> Tensor:
    """dX [M, K] out of every dY and dS."""
    bits = [part.bits for part in parts]
    As, dys = [part.A for part in parts], [part.dy for part in parts]
    dy, low, K = dys[0], As[0].dtype, parts[0].w.shape[0]
    r, masked = max(d.shape[1] for d in ds), any(b is not None for b in bits)
    if how == "fused":
        n = sum(d.shape[1] for d in dys)
        config = tuned.config("gemm_grad_input", dy, low, n, K, r, len(parts), masked)
        ws = [part.w.t() for part in parts]
        return fused_grad_input(dys, ws, ds, As, bits, config=config)
    config = tuned.config("low_rank_grad_input", dy, low, 0, K, r, len(parts), masked)
    dx = low_rank_grad_input(ds, As, bits, config=config)
    for part in parts:
        dx.addmm_(part.dy, part.w.t())
    return dx


@on_its_device
def infer(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    transposed: bool,
    how: str | None = None,
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` as stored, [K, N] when ``transposed``;
    ``how`` one of ``INFER``, by default "small" for as many rows as that takes, unless a table
    knows better."""
    if _declines(x, A):
        return torch_backend.infer(x, w, bias, A, B, scale, transposed)
    x2 = x.reshape(-1, x.shape[-1])
    few = x2.shape[0] <= MAX_ROWS
    N, r = B.shape
    if few and how is None:
        K = x2.shape[1]
        how = tuned.best_of(INFER, "infer", x2, A.dtype, N, K, r) or INFER[0]
    if few and how == "small":
        config = tuned.config("small", x2, A.dtype, N, x2.shape[1], r)
        y = decode(x2, w.t() if transposed else w, A, B, scale, bias, config=config)
    else:
        how = how if how in PRODUCTS else None
        y, _, _ = forward(x2, w if transposed else w.t(), bias, A, B, scale, 0.0, how)
    return y.view(*x.shape[:-1], y.shape[-1])
