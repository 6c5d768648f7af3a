"""A mixture's gradients by autograd of the plain formula: as a graph, in batches, in transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..apart import apart
from ..bits import unpack_bits
from ..torch_products import low_rank_dtype
from . import grouped, loop
from .packing import with_tensors
from .parts import Call, ExpertLinear, Kept
from .plain import plain_experts, plain_linear

Masks = list[Tensor | None]


def masks_of_pairs(part: ExpertLinear, words: Tensor | None, order: Tensor) -> Masks:
    """The mask [P, columns] of each adapter in the order of pairs, as numbers."""
    if words is None:
        return [None] * len(part.factors)
    columns, dtype = part.weight.shape[2], part.weight.dtype
    found: Masks = []
    for i, f in enumerate(part.factors):
        if f.p == 0.0:
            found.append(None)
            continue
        mask = unpack_bits(words[i if len(words) > 1 else 0], columns, dtype)
        found.append(torch.empty_like(mask).index_copy_(0, order, mask))
    return found


def in_a_transform(call: Call) -> Tensor:
    """The output by the formula, with the errors of the operation's ways."""
    (loop if call.x.is_cpu else grouped).check_values(call)
    return plain_call(call)


def plain_call(call: Call, masks: tuple[Masks, Masks] | None = None) -> Tensor:
    """The output by the formula; without ``masks`` they are drawn."""
    up, down = masks or (_drawn(call, call.up), _drawn(call, call.down))
    return plain_experts(
        call.x, call.chosen, call.weights, call.up, call.down, call.gate,
        norm=call.norm, choice=call.choice, up_masks=up, down_masks=down,
    )  # fmt: skip


def plain_rows(call: Call, pairs: Tensor, words: Tensor | None, gather: bool) -> Tensor:
    """Y [P, N] of the call's ``up`` alone on sorted rows, by the formula; see :mod:`.alone`."""
    tokens = pairs // call.chosen.shape[1]
    x = call.x.index_select(0, tokens) if gather else call.x
    masks = masks_of_pairs(call.up, words, torch.arange(len(pairs), device=pairs.device))
    expert = call.chosen.reshape(-1)[pairs]
    y = x.new_zeros((len(pairs), call.up.weight.shape[1]))
    for e in range(call.experts):
        rows = (expert == e).nonzero()[:, 0]
        chosen = None if call.choice is None else call.choice[tokens[rows]]
        own = [None if mask is None else mask[rows] for mask in masks]
        y = y.index_put((rows,), plain_linear(x[rows], call.up, e, chosen, own))
    return y


def _drawn(call: Call, part: ExpertLinear) -> Masks:
    P, K = call.chosen.numel(), part.weight.shape[2]
    like = call.x.new_empty((P, K), dtype=low_rank_dtype(call.x, part.weight))
    return [
        torch.bernoulli(torch.full_like(like, 1.0 - f.p)) if f.p > 0.0 else None
        for f in part.factors
    ]


def differentiable(
    call: Call,
    tensors: Sequence[Tensor | None],
    kept: Kept,
    words: Sequence[Tensor | None],
    dout: Tensor,
    needs: Any,
) -> list[Tensor | None]:
    """The gradient of each of ``tensors``, of ``call``; a graph where gradients are on."""
    wanted = [i for i, need in enumerate(needs) if need]
    parts = zip((call.up, call.down), words, strict=True)
    up, down = (masks_of_pairs(part, bits, kept.order.pairs) for part, bits in parts)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = apart(tensors)  # the routing weights are a function of the tokens
        y = plain_call(with_tensors(call, own), (up, down))
        sources: Any = [own[i] for i in wanted]
        found = torch.autograd.grad(y, sources, dout, create_graph=graph, allow_unused=True)
    grads = dict(zip(wanted, found, strict=True))
    return [grads.get(i) for i in range(len(tensors))]
