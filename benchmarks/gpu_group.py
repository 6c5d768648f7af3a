"""q, k, v as one operation straight over the kernels: X is read once in shrink and once in dA, and
one dX is written. What the grouped layers can reach at best, whatever stands around the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gpu_blocks import linears
from .gpu_cases import Case
from .gpu_device import Device
from .gpu_providers import ALPHA, Provider


class _Group(torch.autograd.Function):
    """Arguments: x, p, product, then W, A and B of each projection. Returns every Y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, product: str, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        from peftkern.kernels import bits, gemm, shrink, write

        count = len(weights) // 3
        ws, As, Bs = weights[:count], weights[count : 2 * count], weights[2 * count :]
        words = None
        if p > 0:
            seed: int | Tensor = int(torch.randint(2**62, (1,)))
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                seed = torch.randint(2**62, (1,), device=x.device)
            words = bits.dropout_bits(*x.shape, p, seed, groups=count, device=x.device)
        each = None if words is None else list(words)
        s = shrink.shrink(x, As, ALPHA / (1 - p), each)
        parts = s.split([a.shape[0] for a in As], dim=1)
        outs = []
        for w, part, b in zip(ws, parts, Bs, strict=True):
            if product == "fused":
                outs.append(gemm.fused_linear(x, w, part, b))
            else:
                outs.append(write.expand(part, b).addmm_(x, w.t()))
        ctx.save_for_backward(x, s, words, *weights)
        ctx.p, ctx.product = p, product
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        from peftkern.kernels import gemm, outer, write

        x, s, words, *weights = ctx.saved_tensors
        count = len(weights) // 3
        ws, As, Bs = weights[:count], weights[count : 2 * count], weights[2 * count :]
        each = None if words is None else list(words)
        parts = s.split([a.shape[0] for a in As], dim=1)
        scale = ALPHA / (1 - ctx.p)
        pairs = [outer.grad_output(d, b, v, scale) for d, b, v in zip(dys, Bs, parts, strict=True)]
        ds = [d for d, _ in pairs]
        das = outer.grad_a(x, ds, each)
        if ctx.product == "fused":
            dx = gemm.fused_grad_input(dys, ws, ds, As, each)
        else:
            dx = write.low_rank_grad_input(ds, As, each)
            for dy, w in zip(dys, ws, strict=True):
                dx.addmm_(dy, w)
        dbs = [db.to(b.dtype) for (_, db), b in zip(pairs, Bs, strict=True)]
        das = [da.to(a.dtype) for da, a in zip(das, As, strict=True)]
        return (dx, None, None, *(None,) * count, *das, *dbs)


def group_provider(
    name: str,
    product: str,
    case: Case,
    plain: list[nn.Module],
    drawn: list[dict[str, tuple[Tensor, Tensor]]],
    device: Device,
) -> Provider:
    """The provider over :class:`_Group`, with fp32 adapters."""
    calls, adapters = [], []
    for block, weights in zip(plain, drawn, strict=True):
        ws = [layer.weight for layer in linears(block, case).values()]
        names = list(linears(block, case))
        own = {n: tuple(t.clone().requires_grad_(True) for t in weights[n]) for n in names}
        flat = [*ws, *(own[n][0] for n in names), *(own[n][1] for n in names)]

        def call(x: Tensor, flat: list[Tensor] = flat) -> tuple[Tensor, ...]:
            return _Group.apply(x, case.p, product, *flat)

        calls.append(call)
        adapters.append(own)
    return Provider(name, calls, adapters)
