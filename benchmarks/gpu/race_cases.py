"""The cases of the race, the most informative ones first, and the tensors of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from peftkern.kernels.decode import MAX_ROWS

from ..kernels.entry import Bucket, Drawn
from ..kernels.table import ops
from .cases import LLAMA_8B, LLAMA_70B
from .contest import Contest, RaceCase
from .device import Device
from .whole import contest as whole


def race_cases() -> list[RaceCase]:
    """The cases: every bucket of shapes with each kernel raced on it, and the whole operations."""
    found: dict[RaceCase, None] = {}
    for step in _order():
        if isinstance(step, RaceCase):
            found[step] = None
            continue
        for op in ops().values():
            if op.kind == step.kind:
                found.update(dict.fromkeys(op.cases(step)))
    return list(found)


def _low_rank(M: int, r: int, mask: bool, k: int, *more: int) -> Bucket:
    """A bucket for kernels over X or dY [M, k]; ``more`` are the group's other projections."""
    return Bucket("low_rank", M, r, k, (k, *more), mask)


def _joined(M: int, r: int, mask: bool, k: int, *ns: int) -> Bucket:
    return Bucket("joined", M, r, k, ns, mask)


def _product(M: int, r: int, n: int, k: int) -> Bucket:
    return Bucket("product", M, r, k, (n,))


def _mlp(M: int, r: int, mask: bool, wide: int) -> Bucket:
    return Bucket("mlp", M, r, wide, (), mask)


def _experts(
    T: int, r: int, mask: bool, width: int, inner: int, experts: int, top: int,
    layout: str = "halves",
) -> Bucket:  # fmt: skip
    return Bucket("experts", T, r, width, (inner,), mask, experts, top, layout)


def _train(M: int, r: int, k: int, *ns: int) -> Iterator[RaceCase]:
    for mask in (True, False):
        for op in ("forward", "backward"):
            yield RaceCase(op, M, sum(ns), k, r, mask, group=len(ns), ns=ns)


def _infer(M: int, r: int, k: int, *ns: int) -> Iterator[RaceCase]:
    for graph in (True, False) if M <= MAX_ROWS else (False,):
        yield RaceCase("infer", M, sum(ns), k, r, group=len(ns), ns=ns, graph=graph)


def _order() -> Iterator[Bucket | RaceCase]:
    """Buckets and cases, first those on which a training step of Llama-8B spends most time."""
    h, wide, kv = LLAMA_8B.hidden, LLAMA_8B.wide, LLAMA_8B.kv
    for M in (8192, 2048):
        for mask in (True, False):
            yield _low_rank(M, 16, mask, h)
            yield _joined(M, 16, mask, h, h)
        yield _product(M, 16, h, h)
        yield from _train(M, 16, h, h)
    for mask in (True, False):
        yield _mlp(8192, 16, mask, wide)
    for M in (1, 16):
        for n, k in ((h, h), (wide, h), (h, wide), (kv, h)):
            yield Bucket("few", M, 16, k, (n,))
            yield from _infer(M, 16, k, n)
        for ns in ((h, kv, kv), (wide, wide)):  # q, k, v; gate and up
            yield Bucket("few", M, 16, h, ns)
            yield from _infer(M, 16, h, *ns)
    for size in (wide, kv):
        for mask in (True, False):
            yield _low_rank(8192, 16, mask, size)
    for n, k in ((wide, h), (h, wide), (kv, h)):
        yield _product(8192, 16, n, k)
        yield from _train(8192, 16, k, n)
    for M in (512, 128):
        for mask in (True, False):
            yield _low_rank(M, 16, mask, h)
        yield _product(M, 16, h, h)
        yield from _train(M, 16, h, h)
        yield from _infer(M, 16, h, h)
    for mask in (True, False):  # q, k, v share X
        yield _low_rank(8192, 16, mask, h, kv, kv)
        yield _joined(8192, 16, mask, h, h, kv, kv)
        yield _joined(8192, 16, mask, h, wide, wide)
    for M in (8192, 2048):
        yield from _train(M, 16, h, h, kv, kv)
        yield from _train(M, 16, h, wide, wide)  # gate and up
    for r in (64, 128, 8):
        for mask in (True, False):
            yield _low_rank(8192, r, mask, h)
            yield _joined(8192, r, mask, h, h)
        yield _product(8192, r, h, h)
        yield from _train(8192, r, h, h)
    for M, r in ((2048, 16), (512, 16), (8192, 64), (8192, 8)):
        for mask in (True, False):
            yield _mlp(M, r, mask, wide)
    for M in (8192, 2048):
        for mask in (True, False):
            yield _low_rank(M, 16, mask, LLAMA_70B.hidden)
        yield _product(M, 16, LLAMA_70B.hidden, LLAMA_70B.hidden)
        yield from _train(M, 16, LLAMA_70B.hidden, LLAMA_70B.hidden)
    for M in (1, 16):
        for r in (64, 128, 8):
            yield Bucket("few", M, r, h, (h,))
            yield from _infer(M, r, h, h)
    for T in (8192, 1024):  # Qwen3-30B-A3B
        for mask in (True, False):
            yield _experts(T, 16, mask, 2048, 768, 128, 8)
    for T in (1, 8):
        yield _experts(T, 16, False, 2048, 768, 128, 8)
    for mask in (True, False):  # Mixtral-8x7B, gpt-oss-20b
        yield _experts(2048, 16, mask, 4096, 14336, 8, 2)
        yield _experts(8192, 16, mask, 2880, 2880, 32, 4, "interleaved")


def contest(case: RaceCase, device: Device, copies: int) -> Contest:
    """The tensors and entrants of a case of :func:`race_cases`."""
    if case.whole:
        return whole(case, device, copies)
    torch.manual_seed(3)
    op = ops()[case.op]
    run, exact = op.contest(case, Drawn(case, device, copies))
    entrants: dict[str, Any] = {"default": None}
    entrants |= {_label(config): config for config in op.candidates(case)}
    return Contest(run, exact, entrants | dict(zip(op.choices, op.choices, strict=True)))


def _label(config: Any) -> str:
    return " ".join(f"{k}={int(v)}" for k, v in asdict(config).items())
