"""The LoRA linear on the Triton kernels of ``kernels/``; signatures as in :mod:`.torch_backend`.

What the kernels do not take (float64, ranks above 256, a CPU outside Triton's interpreter) goes to the
torch backend, and :func:`why_not` says so. Not measured on a GPU yet, so ``auto`` does not choose it.

The mask is a function of a seed drawn from torch's CPU generator, which gradient checkpointing
restores: the recomputed forward drops the same elements. It has the distribution of torch's dropout, not
its elements.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..kernels import bits as _bits
from ..kernels import common as _common
from ..kernels import gemm as _gemm
from ..kernels import outer as _outer
from ..kernels import shrink as _shrink
from ..kernels import small as _small
from ..kernels import write as _write
from . import torch_backend

name = "triton"

# "hybrid": write the low-rank part, let the vendor's product accumulate onto it. "fused": one kernel.
product = "hybrid"

_noted: set[str] = set()


def why_not(x: Tensor, A: Tensor) -> str | None:
    """Why a call with these tensors goes to the torch backend; None when the kernels take it."""
    if not (x.is_cuda or _common.INTERPRET.value):
        return f"the tensors are on {x.device.type}, and Triton's interpreter is off"
    if x.dtype not in _common.DTYPES:
        return f"dtype {x.dtype}"
    if A.shape[0] > _common.MAX_RANK:
        return f"rank {A.shape[0]} is above {_common.MAX_RANK}"
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
        words = _bits.dropout_bits(*x.shape, p, _seed(x.device), device=x.device)
    s = _shrink.shrink(x, [A], scale / (1.0 - p), words)
    if product == "fused":
        return _gemm.fused_linear(x, w.t(), s, B, bias), s, words
    return _write.expand(s, B, bias).addmm_(x, w), s, words


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
    if _declines(x, A):
        return torch_backend.backward(dy, x, w, A, B, s, bits, scale, p, needs)
    needs_x, needs_a, needs_b = needs
    c = scale / (1.0 - p)
    dx = da = db = None
    if needs_b and s is not None:
        ds, db = _outer.grad_output(dy, B, s, c)
        db = db.to(B.dtype)
    else:
        ds = _shrink.shrink(dy, [B.t()], c)
    if needs_a:
        da = _outer.grad_a(x, [ds], bits)[0].to(A.dtype)
    if needs_x:
        if product == "fused":
            dx = _gemm.fused_grad_input([dy], [w.t()], [ds], [A], bits)
        else:
            dx = _write.low_rank_grad_input([ds], [A], bits).addmm_(dy, w.t())
    return dx, da, db


def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` as stored, [K, N] when ``transposed``."""
    if _declines(x, A):
        return torch_backend.infer(x, w, bias, A, B, scale, transposed)
    x2 = x.reshape(-1, x.shape[-1])
    if x2.shape[0] <= _small.MAX_ROWS:
        y = _small.decode(x2, w.t() if transposed else w, A, B, scale, bias)
    else:
        y, _, _ = forward(x2, w if transposed else w.t(), bias, A, B, scale, 0.0)
    return y.view(*x.shape[:-1], y.shape[-1])
