"""Shared by the entries of the prefix kernels: problems to compile and sanitize, and byte counts.

This file has no entry of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.kernels import prefix_tile

from .entry import BF16, FP16, FP32, INT32, Operands, meta
from .traffic import Facts, nbytes, total


def problem(
    T: int,
    S: int,
    D: int,
    dtype: torch.dtype = BF16,
    *,
    shared: bool = True,
    padded: bool = False,
    B: int = 8,
    heads: tuple[int, int] = (32, 8),
    P: int = 128,
    **options: Any,
) -> prefix_tile.Problem:
    """A problem whose q, k, v [B, heads, rows, D] are [B, rows, heads, D] in memory."""
    H, H_kv = heads
    q, k, v = (
        meta(B, n, h, D, dtype=dtype).transpose(1, 2) for n, h in ((T, H), (S, H_kv), (S, H_kv))
    )
    prefix = [meta(*(() if shared else (B,)), H_kv, P, D, dtype=dtype) for _ in range(2)]
    keep = meta(B, S, dtype=torch.bool) if padded else None
    return prefix_tile.check(q, k, v, *prefix, keep=keep, **options)


WINDOW: dict[str, Any] = dict(window=256)


def everything() -> dict[str, Any]:
    """Arguments of :func:`problem` that turn every option on."""
    return WINDOW | dict(
        padded=True, softcap=50.0, sinks=meta(32, dtype=BF16), q_offset=meta(1, dtype=INT32),
        no_prefix=meta(8, dtype=torch.bool),
    )  # fmt: skip


def training() -> Iterator[tuple[str, prefix_tile.Problem, bool]]:
    """(name, problem, True when its products must use the fastest matrix instruction)."""
    sinks = meta(32, dtype=BF16)
    for D, dtype, name, options in (
        (128, BF16, "causal", {}),
        (64, BF16, "causal", {}),
        (256, BF16, "causal", {}),
        (128, BF16, "padded", dict(padded=True)),
        (64, BF16, "both ways padded per row", dict(padded=True, causal=False, shared=False)),
        (128, BF16, "window", WINDOW),
        (256, BF16, "window softcap padded", WINDOW | dict(softcap=50.0, padded=True)),
        (64, BF16, "window sinks padded", WINDOW | dict(sinks=sinks, padded=True)),
        (64, BF16, "all", everything()),
        (128, BF16, "all", everything()),
        (256, BF16, "all", everything()),
        (96, FP16, "padded per row", dict(padded=True, shared=False)),
        (64, FP32, "padded", dict(padded=True)),
        (128, FP32, "padded", dict(padded=True)),
        (256, FP32, "causal", {}),
    ):
        name = f"D{D} {name} {str(dtype).removeprefix('torch.')}"
        yield name, problem(1024, 1024, D, dtype, **options), dtype != FP32 and D in (64, 128)


class Sample(NamedTuple):
    """Operands of one run, with an incomplete tile at the end of every dimension."""

    name: str
    q: Tensor
    grad: Tensor
    sources: tuple[Tensor, Tensor, Tensor, Tensor]  # k, v, and those of the prefix
    options: dict[str, Any]


def samples(o: Operands) -> Iterator[Sample]:
    """Samples with every kind of mask, each with one shared prefix and with a prefix per row."""
    B, H, H_kv, S, P, D = 2, 4, 2, 37, 19, 24
    k, v = (o(B, S, H_kv, D).transpose(1, 2) for _ in range(2))
    keep = torch.arange(S, device=o.device)[None] >= torch.tensor([[0], [20]], device=o.device)
    masks: dict[str, dict[str, Any]] = {
        "causal": {},
        "both ways, padded": dict(causal=False, keep=keep),
        "all": dict(
            keep=keep, window=30, softcap=5.0, sinks=o(H),
            no_prefix=torch.tensor([True, False], device=o.device),
            q_offset=torch.tensor([3, 9], dtype=torch.int32, device=o.device),
        ),
    }  # fmt: skip
    for name, options in masks.items():
        for lead in ((), (B,)):
            pk, pv = o(*lead, H_kv, P, D), o(*lead, H_kv, P, D)
            name_of = f"{name}, {'a prefix a row' if lead else 'a shared prefix'}"
            yield Sample(name_of, o(B, H, 21, D), o(B, H, 21, D), (k, v, pk, pv), options)


def pairs(f: Facts) -> int:
    """The number of (query, key) pairs of one head in which the query sees the key.

    An offset on the device counts as its default. Padded keys, and the prefix in rows without one,
    count as seen.
    """
    T, S, P = f["T"], f["S"], f["P"]
    if not f["CAUSAL"]:
        return T * (S + P)
    offset = f["q_offset"] if f["q_offset_at"] is None else S - T
    seen = 0
    for t in range(T):
        last = P + min(S, offset + t + 1)
        first = max(0, P + offset + t + 1 - f["window"]) if f["WINDOW"] else 0
        seen += max(0, last - first)
    return seen


def sources(f: Facts) -> tuple[int, int, int]:
    """Bytes of own keys and values, of the prefix's, and of masks and the offset together."""
    own, prefix = nbytes(f["k"]) + nbytes(f["v"]), nbytes(f["prefix_key"]) * 2
    rest = total(f[n] for n in ("keep", "no_prefix", "q_offset_at"))
    return own, prefix, rest


def per_program(f: Facts, rows: int) -> int:
    """Bytes of keys and values that all programs load, each with a tile of ``rows`` query rows."""
    B, H, T, _ = f["q"].shape
    size = 2 * f["D"] * f["q"].element_size()
    offset = f["q_offset"] if f["q_offset_at"] is None else f["S"] - T
    keys = 0
    for t0 in range(0, T, rows):
        last = min(t0 + rows, T) - 1
        seen = min(f["S"], offset + last + 1) if f["CAUSAL"] else f["S"]
        first = f["P"] + offset + t0 - f["window"] + 1 if f["WINDOW"] else 0
        hidden = max(0, first) // f["BLOCK_N"] * f["BLOCK_N"]
        keys += max(0, seen + f["P"] - hidden)
    return B * H * keys * size
