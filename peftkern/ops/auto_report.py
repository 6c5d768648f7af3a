"""What :mod:`.auto_backend` decided for a layer, in words, for ``explain``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import auto_backend, choices, triton_backend, tuned

Numbers = tuple[int, int, int, int]  # (sum of N, K, largest r, projections)


def describe(
    like: Tensor, adapter: torch.dtype, alone: Numbers, together: Numbers | None = None
) -> str:
    """Which way the operations of a layer go and why, e.g. ``auto: forward M<=2048 hybrid 1.31x
    torch, infer M<=1 decode: raced here on 2026-11-25``.

    Args:
        like: a tensor of the activations' dtype and device, the weight say.
        adapter: dtype of A.
        alone: the layer's numbers.
        together: those of its group, as which it trains.
    """
    book = tuned.book(like.get_device())
    found = []
    for memos in (book.decisions, book.provisional):
        for memo, decision in list(memos.items()):
            op, dtype, low, bits, n, k, r, group, mask, *_ = memo
            wanted = alone if op == "infer" or together is None else together
            if (dtype, low) == (like.dtype, adapter) and (n, k, r, group) == wanted:
                found.append((op, bits, mask, group, decision))
    if found:
        found.sort(key=lambda item: item[:3])
        told = dict.fromkeys(_line(*item) for item in found)
        reasons = dict.fromkeys(item[-1].why for item in found)
        return f"auto: {', '.join(told)}: {', '.join(reasons)}"
    reason = triton_backend.refusal(like, adapter, alone[2])
    if reason is not None:
        return f"auto: torch, {reason}"
    return f"auto: not called yet: {_not_called(book, like, adapter, {alone, together})}"


def _line(op: str, bits: int, mask: bool, group: int, decision: Any) -> str:
    how = decision.how
    if decision.in_graph != how:
        how += f" (in a graph {decision.in_graph})"
    gain = f" {decision.gain:.2f}x torch" if decision.gain and how != choices.TORCH else ""
    with_mask = " masked" if mask else ""
    together = f" of {group}" if group > 1 else ""
    return f"{op}{together} M<={1 << bits}{with_mask} {how}{gain}"


def _not_called(book: Any, like: Tensor, adapter: torch.dtype, wanted: set[Any]) -> str:
    names = (tuned.products_in(like.dtype), tuned.name_of(adapter))
    known: dict[int, None] = {}
    for table in (book.cached, book.shipped):
        for key in table.entries if table is not None else ():
            numbers = (key.n, key.k, key.r, key.group)
            if (key.dtype, key.adapter_dtype) == names and numbers in wanted:
                known[key.m] = None
    off = auto_backend.races_off()
    then = f"torch, for {off}" if off else "raced at its first call"
    if known:
        rows = ", ".join(map(str, sorted(known)))
        then = f"M<={rows} known from earlier, else {then}"
    return f"{then}; {book.shipped_note}"


def undecided(book: Any, key: Any) -> str:
    """Why a race of this key gave no result."""
    for memos in (book.decisions, book.provisional):
        for memo, decision in memos.items():
            op, dtype, low, bits, n, k, r, group, mask, grads, _ = memo
            numbers = (op, tuned.name_of(low), 1 << bits, n, k, r, group, mask, grads)
            wanted = (key.op, key.adapter_dtype, key.m, key.n, key.k, key.r, key.group)
            if numbers == (*wanted, key.mask, key.grads) and key.dtype == tuned.products_in(dtype):
                return str(decision.why)
    return "not raced"
