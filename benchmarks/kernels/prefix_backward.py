"""The entry of the kernels for prefix attention, backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.kernels import prefix_attention, prefix_backward, prefix_tile
from peftkern.kernels.common import Arch, Launch

from . import prefix
from .entry import FP32, Case, KernelEntry, Operands, meta
from .traffic import Facts, Traffic, cdiv, nbytes, total, unit_of


def _grad_rows(f: Facts) -> Traffic:
    own, others, rest = prefix.sources(f)
    rows = nbytes(f["q"]) + nbytes(f["o"]) + nbytes(f["grad_o"]) + nbytes(f["lse"])
    B, H, _, D = f["q"].shape
    return Traffic(
        "grad_rows", 1,
        read=rows + own + others + rest,
        written=nbytes(f["grad_q"]) + nbytes(f["delta"]),
        flops=6 * B * H * D * prefix.pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=rows + rest + prefix.per_program(f, f["BLOCK_M"]),
    )  # fmt: skip


def _rows_of_keys(f: Facts) -> int:
    """Query rows of one head that all programs load, each with a tile of own or prefix keys.

    An offset on the device counts as its default.
    """
    T, rows, block = f["T"], 0, f["BLOCK_N"]
    offset = f["q_offset"] if f["q_offset_at"] is None else f["S"] - T
    for count, shift in ((f["P"], f["P"]), (f["S"], 0)):
        for n0 in range(0, count, block):
            first, last = 0, T
            if f["CAUSAL"]:
                first = max(0, n0 - shift - offset) // f["BLOCK_M"] * f["BLOCK_M"]
            if f["WINDOW"]:
                end = min(n0 + block, count) - shift - offset + f["window"] - 1
                last = min(T, max(0, end))
            rows += max(0, last - first)
    return rows


def _grad_keys(f: Facts) -> Traffic:
    """Traffic of a launch for the gradients of keys and values.

    The query rows are read once for the own keys and once for the prefix: programs that run at the
    same time share their loads.
    """
    own, others, rest = prefix.sources(f)
    rows = nbytes(f["q"]) + nbytes(f["grad_o"]) + nbytes(f["lse"]) + nbytes(f["delta"])
    B, H, T, D = f["q"].shape
    tiles_p, tiles_s = cdiv(f["P"], f["BLOCK_N"]), cdiv(f["S"], f["BLOCK_N"])
    gradients = ("grad_k", "grad_v", "grad_pk", "grad_pv")
    return Traffic(
        "grad_keys", 1,
        read=rows * (bool(tiles_p) + bool(tiles_s)) + own + others + rest,
        written=total(f[name] for name in gradients),
        flops=8 * B * H * D * prefix.pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=rows // T * _rows_of_keys(f) + own + others + rest,
    )  # fmt: skip


def launches(x: prefix_tile.Problem, arch: Arch) -> list[Launch]:
    """The launches with the default config."""
    B, H, _, T, _, _, _ = x.sizes
    o, lse = x.rows_like_q(), meta(B, H, T, dtype=FP32)
    grads = prefix_backward.Grads(
        x.rows_like_q(), torch.empty_like(x.k), torch.empty_like(x.v),
        *(torch.empty_like(x.prefix_key, dtype=FP32) for _ in range(2)),
    )  # fmt: skip
    config = prefix_backward.default_config(x.sizes, x.shared, arch, x.q.element_size())
    return prefix_backward.plan_backward(
        x, o, lse, torch.empty_like(o), torch.empty_like(lse), grads, config
    )


def _cases(arch: Arch) -> Iterator[Case]:
    for name, x, fast in prefix.training():
        if prefix_backward.declines(x.q.dtype, x.sizes[-1]):
            continue
        for launch, what in zip(launches(x, arch), ("rows", "keys", "sum"), strict=False):
            yield Case(f"prefix bwd {what} {name}", launch, fast and what != "sum")


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    ahead = prefix_attention.AttendConfig(16, 16, 4, 2)
    config = prefix_backward.BackwardConfig(16, 16, 16, 16, 2)
    for s in prefix.samples(o):
        out, lse = prefix_attention.attend(s.q, *s.sources, **s.options, config=ahead)
        grads = prefix_backward.attend_backward(
            s.grad, s.q, *s.sources, out, lse, **s.options, config=config
        )
        yield f"prefix attention's gradients {s.name}", [*grads[:5]]


ENTRY = KernelEntry(
    traffic={"_grad_rows_kernel": _grad_rows, "_grad_keys_kernel": _grad_keys},
    cases=_cases,
    sanitize=_sanitize,
)
