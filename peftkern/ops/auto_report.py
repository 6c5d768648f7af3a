"""Describes the decisions of :mod:`.auto_backend` for a layer, for ``explain``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.tuning import Key
from . import auto_backend, choices, triton_backend, tuned

Numbers = tuple[int, int, int, int]  # (sum of N, K, largest r, projections)


def describe(
    like: Tensor, adapter: torch.dtype, alone: Numbers, together: Numbers | None = None
) -> str:
    """The ways of a layer's operations and the reasons, as one line.

    An example is ``auto: forward M<=2048 hybrid 1.31x torch, infer M<=1 decode: raced here on
    2026-11-25``.

    Args:
        like: a tensor of the activations' dtype and device, such as the weight.
        adapter: dtype of A.
        alone: the numbers of the layer.
        together: the numbers of the group as which it trains and decodes, or None.
    """
    book = tuned.book(like.get_device())
    found, dtypes = [], (tuned.products_in(like.dtype), tuned.NAMES[adapter])
    for memos in (book.decisions, book.provisional):
        for key, decision in list(memos.items()):
            # without gradients only few rows are computed together
            wanted = {alone} if together is None else {together}
            wanted |= {alone} if key.op == "infer" else set()
            if (key.dtype, key.adapter_dtype) == dtypes and _numbers(key) in wanted:
                found.append((key.op, key.m, key.mask, key.group, decision))
    if found:
        found.sort(key=lambda item: item[:3])
        told = dict.fromkeys(_line(*item) for item in found)
        reasons = dict.fromkeys(item[-1].why for item in found)
        return f"auto: {', '.join(told)}: {', '.join(reasons)}"
    reason = triton_backend.refusal(like, adapter, alone[2])
    if reason is not None:
        return f"auto: torch, {reason}"
    return f"auto: not called yet: {_not_called(book, dtypes, {alone, together})}"


def _numbers(key: Key) -> Numbers:
    return key.n, key.k, key.r, key.group


def _line(op: str, m: int, mask: bool, group: int, decision: Any) -> str:
    how = decision.how
    if decision.in_graph != how:
        how += f" (in a graph {decision.in_graph})"
    gain = f" {decision.gain:.2f}x torch" if decision.gain and how != choices.TORCH else ""
    with_mask = " masked" if mask else ""
    together = f" of {group}" if group > 1 else ""
    return f"{op}{together} M<={m}{with_mask} {how}{gain}"


def _not_called(book: Any, dtypes: tuple[str, str], wanted: set[Any]) -> str:
    known: dict[int, None] = {}
    for table in (book.cached, book.shipped):
        for key in table.entries if table is not None else ():
            if (key.dtype, key.adapter_dtype) == dtypes and _numbers(key) in wanted:
                known[key.m] = None
    off = auto_backend.races_off()
    then = f"torch, for {off}" if off else "raced at its first call"
    if known:
        rows = ", ".join(map(str, sorted(known)))
        then = f"M<={rows} known from earlier, else {then}"
    return f"{then}; {book.shipped_note}"


def undecided(book: Any, key: Key) -> str:
    """The reason that a race of this key gave no result."""
    decision = book.decisions.get(key) or book.provisional.get(key)
    return "not raced" if decision is None else str(decision.why)
