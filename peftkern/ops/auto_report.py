"""Describes the decisions of :mod:`.auto_backend` for a layer, for ``explain``."""

from __future__ import annotations

from collections.abc import Callable
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
    dtypes = (tuned.products_in(like.dtype), tuned.NAMES[adapter])

    def own(key: Key) -> bool:
        # without gradients only few rows are computed together
        wanted = {alone} if together is None else {together}
        wanted |= {alone} if key.op == "infer" else set()
        return (key.dtype, key.adapter_dtype) == dtypes and _numbers(key) in wanted

    book = tuned.book(like.get_device())
    told = decisions(book, own)
    if told is not None:
        return f"auto: {told}"
    reason = triton_backend.refusal(like, adapter, alone[2])
    if reason is not None:
        return f"auto: torch, {reason}"

    def tabled(key: Key) -> bool:
        return (key.dtype, key.adapter_dtype) == dtypes and _numbers(key) in {alone, together}

    return f"auto: {not_called(book, tabled)}"


def decisions(book: tuned.Book, own: Callable[[Key], bool]) -> str | None:
    """The decisions for calls whose keys are ``own`` and their reasons; None without one."""
    found = [
        (key.op, key.m, key.mask, key.group, decision)
        for memos in (book.decisions, book.provisional)
        for key, decision in list(memos.items())
        if own(key)
    ]
    if not found:
        return None
    found.sort(key=lambda item: item[:3])
    told = dict.fromkeys(_line(*item) for item in found)
    reasons = dict.fromkeys(item[-1].why for item in found)
    return f"{', '.join(told)}: {', '.join(reasons)}"


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


def not_called(book: tuned.Book, own: Callable[[Key], bool]) -> str:
    """What will decide the first call whose key is ``own``."""
    known = {
        key.m: None
        for table in (book.cached, book.shipped)
        for key in (table.entries if table is not None else ())
        if own(key)
    }
    off = auto_backend.races_off()
    then = f"torch, for {off}" if off else "raced at its first call"
    if known:
        rows = ", ".join(map(str, sorted(known)))
        then = f"M<={rows} known from earlier, else {then}"
    return f"not called yet: {then}; {book.shipped_note}"


def undecided(book: Any, key: Key) -> str:
    """The reason that a race of this key gave no result."""
    decision = book.decisions.get(key) or book.provisional.get(key)
    return "not raced" if decision is None else str(decision.why)
