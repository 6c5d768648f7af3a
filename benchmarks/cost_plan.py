"""Launches of a LoRA group: the floor, and what the Triton kernels allow when planned together.

The plan is a target for the backend, made of the launches the kernels ship, with their default
configs for the GPU. It differs from calling their public functions one by one in two ways: X is
read once for all projections of the group, and sums that follow each other share one launch, which
writes gradients in the parameters' dtype. What the backend really does is counted by running it
(``cost_cases``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.kernels import bits, gemm, outer, shrink, write
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.reduce import plan_sum

from .cost_kernels import Traffic, nbytes, traffic, unit_of, vendor_gemm

ORDERS = ("floor", "hybrid", "fused")


class Group(NamedTuple):
    """Projections [N_i, K] of one X [M, K], each with an adapter of rank r, p of dropout."""

    M: int
    K: int
    Ns: tuple[int, ...]
    r: int
    p: float
    adapter: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Tensors:
    """The tensors of one step of a group, without data."""

    def __init__(self, g: Group) -> None:
        size, low = g.dtype, g.adapter
        self.x, self.dx = _meta(g.M, g.K, dtype=size), _meta(g.M, g.K, dtype=size)
        self.ws = [_meta(n, g.K, dtype=size) for n in g.Ns]
        self.ys = [_meta(g.M, n, dtype=size) for n in g.Ns]
        self.As = [_meta(g.r, g.K, dtype=low) for _ in g.Ns]
        self.Bs = [_meta(n, g.r, dtype=low) for n in g.Ns]
        self.s = _meta(g.M, g.r * len(g.Ns), dtype=size)
        self.s_of = [self.s[:, i * g.r : (i + 1) * g.r] for i in range(len(g.Ns))]
        self.words = _meta(len(g.Ns), g.M, -(-g.K // 32), dtype=torch.int32) if g.p else None

    def masks(self) -> list[Tensor | None]:
        return [None] * len(self.ws) if self.words is None else list(self.words)


def kept(g: Group) -> list[Tensor]:
    """What backward needs beyond X and the weights, without data."""
    t = _Tensors(g)
    return [t.s] if t.words is None else [t.s, t.words]


def forward(g: Group, order: str, arch: Arch) -> list[Traffic]:
    """Launches that make every Y."""
    t = _Tensors(g)
    if order == "floor":
        return [_floor(g, [t.x, *t.ws, *t.As, *t.Bs], [*t.ys, t.s], passes=1)]
    ranks = [g.r] * len(g.Ns)
    launches: list[Launch] = []
    if t.words is not None:
        launches += bits.plan_bits(t.words, g.K, g.p, 0, bits.BitsConfig())
    config = shrink.default_config(g.M, g.K, ranks, arch)
    launches += shrink.plan_shrink(t.x, t.As, t.masks(), [1.0] * len(ranks), t.s, config)
    done = [traffic(launch) for launch in launches]
    for n, w, y, s, b in zip(g.Ns, t.ws, t.ys, t.s_of, t.Bs, strict=True):
        if order == "fused":
            tile = gemm.default_config(g.M, n, g.r, arch, itemsize=g.dtype.itemsize)
            (launch,) = gemm.plan_gemm(y, [t.x], [w], [s], [b.T], [None], None, arch, tile)
            done.append(traffic(launch))
        else:
            onto = write.default_config(g.M, [g.r])
            done += map(traffic, write.plan_write(y, [s], [b.T], [None], None, None, onto))
            done.append(vendor_gemm(g.M, n, g.K, g.dtype, accumulate=True))
    return done


def backward(g: Group, order: str, arch: Arch) -> list[Traffic]:
    """Launches that make dX and every dA, dB out of every dY."""
    t = _Tensors(g)
    dAs = [torch.empty_like(a, dtype=torch.float32) for a in t.As]
    dBs = [torch.empty_like(b, dtype=torch.float32) for b in t.Bs]
    if order == "floor":
        reads = [t.x, *t.ys, *t.ws, *t.As, *t.Bs, t.s]
        return [_floor(g, reads, [t.dx, *t.As, *t.Bs], passes=2)]
    ds = [_meta(g.M, g.r, dtype=g.dtype) for _ in g.Ns]
    over_dy: list[Launch] = []
    for n, dy, b, s, d, db in zip(g.Ns, t.ys, t.Bs, t.s_of, ds, dBs, strict=True):
        config = outer.default_outer_config(g.M, n, g.r, arch, g.dtype.itemsize)
        if config is None:
            over_dy += outer.plan_two_pass(dy, b, s, 1.0, d, db, arch)
        else:
            over_dy += outer.plan_outer(dy, b, s, 1.0, d, db, config)
    ranks = [g.r] * len(g.Ns)
    config_a = outer.default_grad_a_config(g.M, g.K, arch, ranks)
    over_x = outer.plan_grad_a(t.x, ds, t.masks(), dAs, config_a)
    done = [*_stage(over_dy, dBs, g.adapter), *_stage(over_x, dAs, g.adapter)]
    if order == "fused":
        tile = gemm.default_config(
            g.M, g.K, g.r, arch, group=len(ds), masked=g.p > 0, itemsize=g.dtype.itemsize
        )
        ws = [w.T for w in t.ws]
        (launch,) = gemm.plan_gemm(t.dx, t.ys, ws, ds, t.As, t.masks(), None, arch, tile)
        return [*done, traffic(launch)]
    onto = write.default_config(g.M, ranks)
    done += map(traffic, write.plan_write(t.dx, ds, t.As, t.masks(), None, None, onto))
    return [*done, *(vendor_gemm(g.M, g.K, n, g.dtype, accumulate=True) for n in g.Ns)]


def _stage(launches: list[Launch], grads: list[Tensor], dtype: torch.dtype) -> list[Traffic]:
    """The launches with all their sums put into one at the end, which writes ``grads`` in
    ``dtype``; a gradient that no sum makes is cast by a launch of its own."""
    done, pairs = [], []
    for launch in launches:
        if launch.kernel.__name__ != "_sum_kernel":
            done.append(traffic(launch))
            continue
        for partial, out in zip(launch.args[0], launch.args[1], strict=True):
            rest = [t for t in grads if not _shares(t, out)]
            is_grad, grads = len(rest) < len(grads), rest
            pairs.append((partial, torch.empty_like(out, dtype=dtype) if is_grad else out))
    if pairs:
        done.append(traffic(plan_sum(pairs)))
    if dtype != torch.float32:
        done += [Traffic("cast", 1, nbytes(t), nbytes(t.to(dtype))) for t in grads]
    return done


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether one is a view of the other's memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _floor(g: Group, reads: Sequence[Tensor], writes: Sequence[Tensor], passes: int) -> Traffic:
    """Every input read once, every result written once, in one launch; a mask made anew is free.

    ``passes`` low-rank products of each kind: one forward; dS with dB, dA with dX's part backward.
    """
    base = 2 * g.M * g.K * sum(g.Ns)
    low = 2 * g.M * g.r * (g.K * len(g.Ns) + sum(g.Ns)) * passes
    read, written = sum(map(nbytes, reads)), sum(map(nbytes, writes))
    return Traffic("floor", 1, read, written, base + low, unit_of(g.dtype))
