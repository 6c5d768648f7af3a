"""A few numbers of a mixture's output, with the same numbers in float64; see :mod:`..sampled`.

They are the output of two tokens, for which the weights of their experts alone are converted.
Gradients are compared with those of torch's own way (:mod:`..race`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..sampled import Exact, Sample, of_other_shapes, places
from .parts import Call, ExpertLinear

_TOKENS = 2


def _linear(x: Tensor, part: ExpertLinear, e: int, chosen: int | None) -> Tensor:
    """x [K] in float64 through expert e, with adapter ``chosen`` alone or None for all."""
    y = part.weight[e].double() @ x
    if part.bias is not None:
        y = y + part.bias[e].double()
    for i, f in enumerate(part.factors):
        if chosen in (None, i) and f.A.shape[0]:
            A, B = (t[e].double() for t in f.of_experts(part.weight.shape[0]))
            y = y + f.scale * (B @ (A @ x))
    return y


def output(call: Call) -> Exact:
    """The samples of a result whose first tensor is the output [T, N]."""
    T, N = call.x.shape[0], call.down.weight.shape[1]

    @functools.cache
    def truth() -> tuple[Tensor, Tensor]:
        tokens = places(T, _TOKENS, call.x.device)
        found = call.x.new_zeros((len(tokens), N), dtype=torch.float64)
        for row, t in enumerate(tokens.tolist()):
            chosen = None if call.choice is None else int(call.choice[t])
            for j, e in enumerate(call.chosen[t].tolist()):
                if e >= call.experts:
                    continue
                gu = _linear(call.x[t].double(), call.up, e, chosen)
                h = call.gate.function(gu[None])[0]
                y = _linear(h.double(), call.down, e, chosen)
                found[row] += call.weights[t, j].double() * y
        return tokens, found

    def samples(result: Any) -> list[Sample]:
        y = result[0]
        if found := of_other_shapes([y], [(T, N)]):
            return found
        tokens, exact = truth()
        return [Sample("Y", y[tokens], exact)]

    return samples
