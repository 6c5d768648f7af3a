"""Dropout masks of a mixture's adapters, on sorted rows and packed.

They are drawn by the generator of x's device, before anything is computed, in blocks of rows: what
a mask takes before it is packed does not grow with the number of pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.reference import reference_bits
from ..bits import pack_bits, words_per_row
from .order import Order
from .parts import Call, ExpertLinear

_ROWS = 1024  # drawn at a time


def draw_words(
    part: ExpertLinear, rows: int, columns: int, adapter: Tensor | None
) -> Tensor | None:
    """int32 [masks, rows, ceil(columns / 32)], one mask for each adapter of ``part``.

    With ``adapter`` [rows], that of each row, there is one mask for all. None if none drops.
    """
    ps = [f.p for f in part.factors]
    if not any(ps):
        return None
    device, made = part.weight.device, 1 if adapter is not None else len(ps)
    words = torch.empty((made, rows, words_per_row(columns)), dtype=torch.int32, device=device)
    keep = None
    if adapter is not None:
        keep = torch.tensor([*(1.0 - p for p in ps), 1.0], device=device)[adapter][:, None]
    for i in range(made):
        if keep is None and ps[i] == 0.0:
            words[i].fill_(-1)
            continue
        for start in range(0, rows, _ROWS):
            block = words[i, start : start + _ROWS]
            noise = torch.empty((len(block), columns), device=device)
            if keep is None:
                noise.bernoulli_(1.0 - ps[i])
            else:
                noise.bernoulli_(keep[start : start + _ROWS].expand_as(noise))
            block.copy_(pack_bits(noise.bool()))
    return words


def words_of(call: Call, order: Order) -> tuple[Tensor | None, Tensor | None]:
    """The packed masks of up and of down for the sorted rows."""
    adapter = adapter_of_rows(call, order.pairs)
    up, down = (
        draw_words(part, len(order.pairs), part.weight.shape[2], adapter)
        for part in (call.up, call.down)
    )
    return up, down


def adapter_of_rows(call: Call, pairs: Tensor) -> Tensor | None:
    """int64 [P], the adapter of each sorted row of a mixed batch; their number for none."""
    if call.choice is None:
        return None
    own = call.choice.to(torch.int64)
    return own.where(own >= 0, call.adapters)[pairs // call.chosen.shape[1]]


def words_of_seed(
    part: ExpertLinear, rows: int, adapter: Tensor | None, seed: Tensor | None
) -> Tensor | None:
    """The masks of :func:`draw_words` as a function of ``seed`` (int64, one element)."""
    ps, columns = [f.p for f in part.factors], part.weight.shape[2]
    if not any(ps) or seed is None:
        return None
    made = [reference_bits(rows, columns, p, seed, group=i) for i, p in enumerate(ps)]
    words = torch.stack(made)
    if adapter is None:
        return words
    every = torch.full_like(words[:1], -1)  # of rows without an adapter
    return torch.cat([words, every])[adapter, torch.arange(rows, device=adapter.device)][None]
