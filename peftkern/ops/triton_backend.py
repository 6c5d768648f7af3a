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
from ..kernels.common import DTYPES, INTERPRET, MAX_RANK
from ..kernels.gemm import fused_grad_input, fused_linear
from ..kernels.mixed import MAX_ADAPTERS
from ..kernels.mixed import mixed as _mixed
from ..kernels.outer import grad_a, grad_output
from ..kernels.shrink import shrink
from ..kernels.small import MAX_ROWS, decode
from ..kernels.write import expand, low_rank_grad_input
from . import torch_backend
from .projection import Part

# "hybrid": write the low-rank part, let the vendor's product accumulate onto it. "fused": one
# kernel.
product = "hybrid"

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


def forward(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [M, N], S [M, r] and the packed mask; ``w`` is [K, N]."""
    if _declines(x, A):
        return torch_backend.forward(x, w, bias, A, B, scale, p)
    words = None
    if p > 0.0:
        words = dropout_bits(*x.shape, p, _seed(x.device), device=x.device)
    s = shrink(x, [A], scale / (1.0 - p), words)
    if product == "fused":
        return fused_linear(x, w.t(), s, B, bias), s, words
    return expand(s, B, bias).addmm_(x, w), s, words


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX [M, K], dA [r, K], dB [N, r]; two calls with the same tensors agree bit for bit."""
    needs_x, needs_a, needs_b = needs
    part = Part(dy, w, A, B, s, bits, scale, p, needs_a, needs_b)
    dx, [(da, db)] = group_backward(x, [part], needs_x)
    return dx, da, db


def group_forward(x: Tensor, members: list[Any]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of several projections of one x [M, K], which the shrink reads once."""
    if any(_declines(x, m.A) for m in members):
        return torch_backend.group_forward(x, members)
    words: list[Tensor | None] = [
        dropout_bits(*x.shape, m.p, _seed(x.device), device=x.device) if m.p > 0.0 else None
        for m in members
    ]
    scales = [m.scale / (1.0 - m.p) for m in members]
    side_by_side = shrink(x, [m.A for m in members], scales, words)
    done = []
    for m, s, bits in zip(
        members, side_by_side.split([m.A.shape[0] for m in members], 1), words, strict=True
    ):
        if product == "fused":
            y = fused_linear(x, m.w.t(), s, m.B, m.bias)
        else:
            y = expand(s, m.B, m.bias).addmm_(x, m.w)
        done.append((y, s, bits))
    return done


def group_backward(
    x: Tensor, parts: list[Any], needs_x: bool
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """One dX [M, K] for all projections, X read once for every dA, and (dA_i, dB_i) of each."""
    if any(_declines(x, part.A) for part in parts):
        return torch_backend.group_backward(x, parts, needs_x)
    ds: list[Tensor] = []
    dbs: list[Tensor | None] = []
    for part in parts:
        c = part.scale / (1.0 - part.p)
        if part.needs_b and part.s is not None:
            d, db = grad_output(part.dy, part.B, part.s, c)
            dbs.append(db.to(part.B.dtype))
        else:
            d = shrink(part.dy, [part.B.t()], c)
            dbs.append(None)
        ds.append(d)
    das: list[Tensor | None] = [None] * len(parts)
    wanted = [i for i, part in enumerate(parts) if part.needs_a]
    if wanted:
        found = grad_a(x, [ds[i] for i in wanted], [parts[i].bits for i in wanted])
        for i, da in zip(wanted, found, strict=True):
            das[i] = da.to(parts[i].A.dtype)
    dx = None
    if needs_x:
        bits = [part.bits for part in parts]
        As, dys = [part.A for part in parts], [part.dy for part in parts]
        if product == "fused":
            dx = fused_grad_input(dys, [part.w.t() for part in parts], ds, As, bits)
        else:
            dx = low_rank_grad_input(ds, As, bits)
            for part in parts:
                dx.addmm_(part.dy, part.w.t())
    return dx, list(zip(das, dbs, strict=True))


def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` as stored,
    [K, N] when ``transposed``."""
    if _declines(x, A):
        return torch_backend.infer(x, w, bias, A, B, scale, transposed)
    x2 = x.reshape(-1, x.shape[-1])
    if x2.shape[0] <= MAX_ROWS:
        y = decode(x2, w.t() if transposed else w, A, B, scale, bias)
    else:
        y, _, _ = forward(x2, w if transposed else w.t(), bias, A, B, scale, 0.0)
    return y.view(*x.shape[:-1], y.shape[-1])


def why_not_mixed(x: Tensor, adapters: Any) -> str | None:
    """Why :func:`mixed` cannot take a batch with these adapters; None when it can."""
    if len(adapters) > MAX_ADAPTERS:
        return f"{len(adapters)} adapters in one batch are more than {MAX_ADAPTERS}"
    weights = [t for a in adapters if a is not None for t in (a.A, a.B.t())]
    return next((r for t in weights if (r := why_not(x, t)) is not None), None)


def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, index: Tensor) -> Tensor:
    """Y [M, N] for x [M, K], w [N, K] and an adapter for each sample, without gradients."""
    As = [None if a is None else a.A for a in adapters]
    Bs = [None if a is None else a.B for a in adapters]
    scales = [0.0 if a is None else a.scale for a in adapters]
    return _mixed(x, w, As, Bs, scales, index, bias)
