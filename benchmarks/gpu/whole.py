"""The race of whole operations: the dispatcher's ways to run each, and their results in float64.

They run through the same functions that the dispatcher calls (:mod:`peftkern.ops.choices`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import bits, reference
from peftkern.ops import choices
from peftkern.ops.projection import Projection, ProjectionGrad

from .contest import SCALE, Contest, RaceCase
from .device import Device, randn

P = 0.1  # the dropout of cases with a mask


class _Tensors:
    """One copy of a case's tensors: x, and lists over the projections of all others."""

    def __init__(self, case: RaceCase, device: Device, words: list[Tensor | None]) -> None:
        dtype, low = (getattr(torch, d) for d in (case.dtype, case.adapter_dtype))
        M, K, r = case.m, case.k, case.r

        def some(*shape: int, scale: float = 1.0) -> Tensor:
            return randn(device, *shape, dtype=dtype, scale=scale)

        def adapter(*shape: int) -> Tensor:  # bf16's values, in the adapter's dtype
            drawn = randn(device, *shape, dtype=torch.float32, scale=0.1)
            return drawn.bfloat16().to(low)

        self.x = some(M, K)
        self.words = words
        self.ws = [some(N, K, scale=K**-0.5) for N in case.ns]
        self.As = [adapter(r, K) for _ in case.ns]
        self.Bs = [adapter(N, r) for N in case.ns]
        self.dys = [some(M, N) for N in case.ns] if case.op == "backward" else []
        p = P if case.mask else 0.0
        self.members = [
            Projection(w, None, A, B, SCALE, p, False)
            for w, A, B in zip(self.ws, self.As, self.Bs, strict=True)
        ]
        self.grads: list[ProjectionGrad] = []
        if case.op == "backward":
            done = choices.forward(choices.TORCH, self.x, self.members, words)
            self.grads = [
                ProjectionGrad(dy, m.w, m.A, m.B, s, word, SCALE, p, True, True)
                for dy, m, (_, s, word) in zip(self.dys, self.members, done, strict=True)
            ]


def contest(case: RaceCase, device: Device, copies: int) -> Contest:
    """The tensors and ways of a case whose ``op`` is one of :data:`kernels.tuning.WHOLE`."""
    torch.manual_seed(3)
    count = len(case.ns)
    words: list[Tensor | None] = [None] * count
    if case.mask:
        drawn = bits.dropout_bits(case.m, case.k, P, 11, groups=count, device=device.torch)
        words = list(drawn)
    held = [_Tensors(case, device, words) for _ in range(copies)]

    def run(how: str, i: int) -> list[Tensor]:
        t = held[i]
        with torch.no_grad():
            if case.op == "forward":
                return choices.tensors(choices.forward(how, t.x, t.members, words))
            if case.op == "backward":
                return choices.tensors(choices.backward(how, t.x, t.grads, True))
            if count > 1:
                return choices.infer_group(how, t.x, t.members)
            (w,), (A,), (B,) = t.ws, t.As, t.Bs
            return [choices.infer(how, t.x, w, None, A, B, SCALE, False)]

    ways = {name: name for name in choices.names(case.op, case.m)}
    return Contest(run, lambda: _exact(case, held[0]), ways)


def _exact(case: RaceCase, t: _Tensors) -> list[Tensor]:
    """The results of ``run``, in the same order, in float64."""
    keeps = [None if w is None else bits.unpack_bits(w, case.k) for w in t.words]
    c = SCALE / (1 - P) if case.mask else SCALE
    if case.op == "backward":
        ds = [reference.grad_s(dy, B, c) for dy, B in zip(t.dys, t.Bs, strict=True)]
        outs: list[Any] = [reference.grad_input(t.dys, t.ws, ds, t.As, keeps)]
        for grad, d, keep in zip(t.grads, ds, keeps, strict=True):
            outs += [reference.grad_a(t.x, d, keep), reference.grad_b(grad.dy, grad.s)]
        return outs
    outs = []
    for w, A, B, keep in zip(t.ws, t.As, t.Bs, keeps, strict=True):
        s = reference.shrink(t.x, A, c, keep)
        y = reference.linear(t.x, w, s, B)
        outs += [y] if case.op == "infer" else [y, s]
    return outs
