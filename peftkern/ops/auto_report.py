"""What :mod:`.auto_backend` decided for a layer, in words, for ``explain``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import auto_backend, choices, triton_backend, tuned


def describe(
    like: Tensor, adapter: torch.dtype, shapes: Iterable[tuple[int, int, int, int]]
) -> str:
    """Which way the operations of a layer go and why, e.g. ``auto: forward M<=2048 hybrid 1.31x
    torch, infer M<=1 small: raced here on 2026-11-25``.

    Args:
        like: a tensor of the activations' dtype and device, the weight say.
        adapter: dtype of A.
        shapes: (sum of N, K, largest r, group size) under which the layer may be called: by itself,
            and in its group.
    """
    wanted = set(shapes)
    book = tuned.book(like.get_device())
    told: dict[str, None] = {}
    reasons: dict[str, None] = {}
    for memos in (book.decisions, book.provisional):
        for memo, decision in sorted(memos.items(), key=lambda item: item[0][:4]):
            op, dtype, low, bits, n, k, r, group, mask, *_ = memo
            if (dtype, low) == (like.dtype, adapter) and (n, k, r, group) in wanted:
                told[_line(op, 1 << bits, mask, group, decision)] = None
                reasons[decision.why] = None
    if told:
        return f"auto: {', '.join(told)}: {', '.join(reasons)}"
    reason = triton_backend.refusal(like, adapter, max((r for _, _, r, _ in wanted), default=1))
    if reason is not None:
        return f"auto: torch, {reason}"
    return f"auto: {_not_seen(book, like, adapter, wanted)}"


def _line(op: str, rows: int, mask: bool, group: int, decision: Any) -> str:
    how = decision.how
    if decision.in_graph != how:
        how += f" (in a graph {decision.in_graph})"
    gain = f" {decision.gain:.2f}x torch" if decision.gain and how != choices.TORCH else ""
    with_mask = " masked" if mask else ""
    together = f" of {group}" if group > 1 else ""
    return f"{op}{together} M<={rows}{with_mask} {how}{gain}"


def _not_seen(
    book: Any, like: Tensor, adapter: torch.dtype, wanted: set[tuple[int, int, int, int]]
) -> str:
    names = (tuned.products_in(like.dtype), tuned.name_of(adapter))
    known = [
        key.m
        for table in (book.cached, book.shipped)
        if table is not None
        for key in table.entries
        if (key.dtype, key.adapter_dtype) == names and (key.n, key.k, key.r, key.group) in wanted
    ]
    if known:
        rows = ", ".join(map(str, sorted(set(known))))
        return f"not called yet; known from earlier races or {book.shipped_note} for M<={rows}"
    off = auto_backend.races_off()
    then = f"torch, for {off}" if off else "raced at its first call"
    return f"not called yet: {then}; {book.shipped_note}"
