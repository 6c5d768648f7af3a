"""The dispatcher for a mixture: torch's own way or the kernels, whichever was faster.

Decisions are made as in :mod:`..auto_backend`. A call whose backward follows is raced with it, as
the backward must take the way of its forward; a race draws no masks, so that torch's generators
stay as they are, and both ways are timed without dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.tuning import Key
from .. import auto_backend, auto_report, choices, tuned
from ..auto_backend import _decide, _known, _now
from ..tuned import key_of
from . import sampled, triton_way
from .parts import Call, ExpertLinear, Wants
from .ways import Choice, Way, of_torch

OPS = ("experts", "experts_step")  # without gradients, and with them


def choose(call: Call, keep: bool) -> Choice:
    """The way for a call that the kernels take."""
    torchs = of_torch(call)
    if auto_backend._foreign(call.x):
        return torchs
    key = _key(call, keep)
    decision = _known(key, call.x)
    if decision is None:
        bare = call._replace(up=_undropped(call.up), down=_undropped(call.down))
        wants = _all_wants(call)

        def way(name: str) -> Any:
            used = torchs if name == choices.TORCH else Choice(triton_way, "triton", "")
            return lambda: _step(used.way, bare, wants) if keep else [used.infer(bare)]

        decision = _decide(key, call.x, way, sampled.output(bare))
    name = choices.TORCH if decision.declined else _now(decision, call.x)
    if name == choices.TORCH:
        return torchs._replace(reason=decision.why)
    return Choice(triton_way, "triton", decision.why)


def _key(call: Call, keep: bool) -> Key:
    factors = [f for part in (call.up, call.down) for f in part.factors]
    r = max((f.rank(call.experts) for f in factors), default=0)
    adapter = factors[0].A.dtype if factors else call.x.dtype
    what = f"{call.gate.name or 'own'} {call.gate.layout}"
    what += "".join(f" {len(p.factors)}{'b' * (p.bias is not None)}" for p in (call.up, call.down))
    (E, N1, K), op = call.up.weight.shape, OPS[keep]
    group = 1 if call.choice is None else 1 << call.adapters.bit_length()
    mask = any(f.p > 0.0 for f in factors)
    T, top = call.chosen.shape
    return key_of(op, call.x.dtype, adapter, T, N1, K, r, group, mask, what, E, top)


def describe(call: Call) -> str:
    """The decisions for mixtures like the call's, whatever their tokens and choices, in words."""
    wanted = _apart_from_rows(_key(call, True))

    def own(key: Key) -> bool:
        return key.op in OPS and _apart_from_rows(key) == wanted

    book = tuned.book(call.x.get_device())
    return auto_report.decisions(book, own) or auto_report.not_called(book, own)


def _apart_from_rows(key: Key) -> Key:
    """The key without what a model's mixture does not tell: tokens, choices, gradients, dropout."""
    return key._replace(op="", m=0, mask=False, top=0)


def _undropped(part: ExpertLinear) -> ExpertLinear:
    return part._replace(factors=tuple(f._replace(p=0.0) for f in part.factors))


def _all_wants(call: Call) -> Wants:
    up, down = (tuple((True, True) for _ in part.factors) for part in (call.up, call.down))
    return Wants(True, call.weights.requires_grad, up, down, False, False)


def _step(way: Way, call: Call, wants: Wants) -> list[Tensor]:
    order = way.ordered(call)
    y, kept = way.forward(call, order, (None, None), keep=True)
    grads = way.backward(call, kept, (None, None), torch.ones_like(y), wants)
    found = [y, grads.x, grads.weights]
    found += [t for part in (grads.up, grads.down) for pair in part.factors for t in pair]
    return [t for t in found if t is not None]
