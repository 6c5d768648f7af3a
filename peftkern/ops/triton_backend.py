"""The LoRA linear on the Triton kernels of ``kernels/``; signatures as in :mod:`.torch_backend`.

What the kernels do not take (float64, ranks above 256, a CPU outside Triton's interpreter) goes to
the torch backend, and :func:`why_not` says so. Not measured on a GPU yet, so ``auto`` does not
choose it.

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
from ..kernels.common import DTYPES, INTERPRET, MAX_RANK, arch_of
from ..kernels.gemm import fused_grad_input, fused_linear
from ..kernels.outer import grad_a, grad_outputs
from ..kernels.pair import fits as pair_fits
from ..kernels.pair import grad_pair
from ..kernels.shrink import shrink
from ..kernels.small import MAX_ROWS, decode
from ..kernels.update import fits as update_fits
from ..kernels.update import update
from ..kernels.write import expand, low_rank_grad_input
from . import torch_backend
from .projection import Part, Projection

# How the base product and the update come together:
#   hybrid   the low-rank part is written, the vendor's product accumulates onto it
#   joined   the same, written by the kernel that makes S (backward: dA), in one launch less;
#            hybrid where that kernel does not hold the ranks
#   fused    one kernel of ours does both products
# An operation that is not told (``how=None``) takes ``product``, or, where that is None, the order
# that its shape suggests; which is fastest on a device only a race tells.
PRODUCTS = ("hybrid", "joined", "fused")
product: str | None = None
# without gradients, up to MAX_ROWS rows, there is also one launch for everything
INFER = ("small", *PRODUCTS)

_noted: set[str] = set()


def why_not(x: Tensor, A: Tensor) -> str | None:
    """Why a call with these tensors goes to the torch backend; None when the kernels take it."""
    if not (x.is_cuda or INTERPRET.value):
        return f"the tensors are on {x.device.type}, and Triton's interpreter is off"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if A.shape[0] > MAX_RANK:
        return f"rank {A.shape[0]} is above {MAX_RANK}"
    if A.dtype not in (x.dtype, torch.float32):
        return f"adapters in {A.dtype} under {x.dtype}"
    return None


def _declines(x: Tensor, A: Tensor) -> bool:
    reason = why_not(x, A)
    if reason is not None and reason not in _noted:
        _noted.add(reason)
        logging.getLogger("peftkern").info("the Triton backend hands a call to torch: %s", reason)
    return reason is not None


def _seed(device: torch.device) -> int | Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # replays of a graph draw anew only from the device's own generator
        return torch.randint(2**62, (1,), device=device)
    return int(torch.randint(2**62, (1,)))


def _order(how: str | None, M: int, ranks: list[int], device: torch.device) -> str:
    """One of PRODUCTS for these rows and ranks."""
    how = how or product
    if how == "joined" or how is None:
        held = pair_fits(ranks)
        if how is None and held:
            held = update_fits(M, ranks, arch_of(device))
        return "joined" if held else "hybrid"
    return how


def draw(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The packed mask [M, ceil(K / 32)] that belongs to ``seed`` (int64, one element), on its
    device."""
    if not (seed.is_cuda or INTERPRET.value):
        return torch_backend.draw(M, K, p, seed)
    return dropout_bits(M, K, p, seed, device=seed.device)


def low_rank_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of S."""
    return x.dtype if why_not(x, A) is None else torch_backend.low_rank_dtype(x, A)


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
    given: list[Tensor | None] | None = None if words is None else [words]
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


def group_forward(
    x: Tensor,
    members: list[Any],
    how: str | None = None,
    words: list[Tensor | None] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of several projections of one x [M, K], which is read once for every S;
    the masks are ``words`` where they are given."""
    if any(_declines(x, m.A) for m in members):
        return torch_backend.group_forward(x, members)
    if words is None:
        words = _draw(x, [m.p for m in members])
    scales = [m.scale / (1.0 - m.p) for m in members]
    As, ranks = [m.A for m in members], [m.A.shape[0] for m in members]
    order = _order(how, x.shape[0], ranks, x.device)
    if order == "joined":
        s, ys = update(x, As, [m.B for m in members], scales, words, [m.bias for m in members])
        ys = [y.addmm_(x, m.w) for y, m in zip(ys, members, strict=True)]
        return list(zip(ys, s.split(ranks, 1), words, strict=True))
    done = []
    parts = shrink(x, As, scales, words).split(ranks, 1)
    for m, s, bits in zip(members, parts, words, strict=True):
        if order == "fused":
            y = fused_linear(x, m.w.t(), s, m.B, m.bias)
        else:
            y = expand(s, m.B, m.bias).addmm_(x, m.w)
        done.append((y, s, bits))
    return done


def _draw(x: Tensor, ps: list[float]) -> list[Tensor | None]:
    """A mask for each projection that drops, in one launch where they drop alike."""
    if len(ps) > 1 and len(set(ps)) == 1 and ps[0] > 0.0:
        return list(dropout_bits(*x.shape, ps[0], _seed(x.device), groups=len(ps), device=x.device))
    return [
        dropout_bits(*x.shape, p, _seed(x.device), device=x.device) if p > 0.0 else None for p in ps
    ]


def group_backward(
    x: Tensor, parts: list[Any], needs_x: bool, how: str | None = None
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """One dX [M, K] for all projections, X read once for every dA, and (dA_i, dB_i) of each."""
    if any(_declines(x, part.A) for part in parts):
        return torch_backend.group_backward(x, parts, needs_x)
    ds, dbs = _over_dy(parts)
    As, bits = [part.A for part in parts], [part.bits for part in parts]
    order = _order(how, parts[0].dy.shape[0], [a.shape[0] for a in As], x.device)
    das: list[Tensor | None] = [None] * len(parts)
    dx = None
    wanted = [i for i, part in enumerate(parts) if part.needs_a]
    if order == "joined" and needs_x and len(wanted) == len(parts):
        dx, found = grad_pair(x, ds, As, bits, out_dtypes=[a.dtype for a in As])
        das = list(found)
    elif wanted:
        found = grad_a(
            x, [ds[i] for i in wanted], [bits[i] for i in wanted],
            out_dtypes=[As[i].dtype for i in wanted],
        )  # fmt: skip
        for i, da in zip(wanted, found, strict=True):
            das[i] = da
    if needs_x and order == "fused":
        dys, ws = [part.dy for part in parts], [part.w.t() for part in parts]
        dx = fused_grad_input(dys, ws, ds, As, bits)
    elif needs_x:
        dx = low_rank_grad_input(ds, As, bits) if dx is None else dx
        for part in parts:
            dx.addmm_(part.dy, part.w.t())
    return dx, list(zip(das, dbs, strict=True))


def _over_dy(parts: list[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """dS_i of every part, dB_i where it is wanted: what reads dY_i alone."""
    ds: list[Any] = [None] * len(parts)
    dbs: list[Tensor | None] = [None] * len(parts)
    both = []
    for i, part in enumerate(parts):
        if part.needs_b and part.s is not None:
            both.append(i)
        else:
            ds[i] = shrink(part.dy, [part.B.t()], part.scale / (1.0 - part.p))
    done = grad_outputs(
        [(q.dy, q.B, q.s, q.scale / (1.0 - q.p)) for q in (parts[i] for i in both)],
        [parts[i].B.dtype for i in both],
    )
    for i, (d, db) in zip(both, done, strict=True):
        ds[i], dbs[i] = d, db
    return ds, dbs


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
    ``how`` one of ``INFER``, by default "small" for as many rows as that takes."""
    if _declines(x, A):
        return torch_backend.infer(x, w, bias, A, B, scale, transposed)
    x2 = x.reshape(-1, x.shape[-1])
    if x2.shape[0] <= MAX_ROWS and how in (None, "small"):
        y = decode(x2, w.t() if transposed else w, A, B, scale, bias)
    else:
        y, _, _ = forward(x2, w if transposed else w.t(), bias, A, B, scale, 0.0, how)
    return y.view(*x.shape[:-1], y.shape[-1])
