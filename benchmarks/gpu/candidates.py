"""What the race runs, case by case; and for each kernel and bucket of shapes a bounded list of
configs, how to launch one, and what comes out in float64. Whole operations: :mod:`.gpu_whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import (
    bits,
    decode,
    expand,
    gemm,
    grad_a,
    grad_sb,
    grad_xa,
    reference,
    shrink,
    shrink_expand,
)

from .cases import LLAMA_8B, LLAMA_70B
from .contest import SCALE, Contest, RaceCase
from .device import Device, randn
from .whole import contest as whole


def _configs(cls: Any, names: str, rows: list[tuple[Any, ...]]) -> list[Any]:
    fields = names.split()
    return [cls(**dict(zip(fields, row, strict=True))) for row in rows]


def config_list(case: RaceCase) -> list[Any]:
    """At most a dozen configs; the kernel's own default comes on top."""
    op, M = case.op, case.m
    if op == "shrink":
        rows = [
            (16, 128, 1, 4, 4), (32, 128, 1, 4, 3), (64, 64, 1, 4, 3), (64, 64, 1, 4, 4),
            (64, 128, 1, 8, 3), (128, 64, 1, 8, 3), (64, 64, 2, 4, 3), (64, 128, 4, 4, 3),
            (16, 128, 4, 4, 4), (16, 128, 8, 4, 4), (16, 256, 16, 4, 3), (32, 64, 8, 4, 4),
        ]  # fmt: skip
        keep = [r for r in rows if (r[2] <= 4 or M <= 2048) and r[0] <= max(16, 2 * M)]
        return _configs(shrink.ShrinkConfig, "block_m block_k split_k num_warps num_stages", keep)
    if op in ("expand", "low_rank_grad_input"):
        rows = [
            (64, 128, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (32, 256, 4, 2), (64, 256, 8, 2),
            (32, 128, 4, 1), (16, 256, 4, 1), (128, 64, 4, 2),
        ]  # fmt: skip
        block_r = min(64, max(16, 1 << (case.r - 1).bit_length()))
        return [
            expand.ExpandConfig(m, n, block_r, warps, stages)
            for m, n, warps, stages in rows
            if m <= max(16, 2 * M)
        ]
    if op == "shrink_expand":
        rows = [
            (64, 64, 128, 4, 3), (32, 64, 128, 4, 3), (32, 128, 128, 4, 3), (64, 64, 64, 4, 3),
            (64, 128, 128, 8, 3), (128, 64, 128, 8, 3), (64, 64, 256, 8, 3), (16, 128, 128, 4, 3),
        ]  # fmt: skip
        return _configs(
            shrink_expand.ShrinkExpandConfig, "block_m block_k block_n num_warps num_stages",
            [r for r in rows if r[0] <= max(16, 2 * M)],
        )  # fmt: skip
    if op == "grad_xa":
        rows = [
            (64, 64, 1, 4, 3), (64, 64, 2, 4, 3), (64, 64, 4, 4, 3), (64, 32, 1, 4, 3),
            (64, 32, 2, 4, 3), (128, 32, 2, 4, 3), (128, 64, 4, 8, 3), (32, 64, 4, 4, 3),
            (64, 128, 8, 8, 2), (64, 64, 8, 4, 3),
        ]  # fmt: skip
        return _configs(
            grad_xa.GradXAConfig, "block_m block_k split_m num_warps num_stages",
            [r for r in rows if r[2] * r[0] <= max(64, M)],
        )  # fmt: skip
    if op == "grad_sb":
        rows = [
            (128, 64, 1, 8, 3), (128, 64, 2, 8, 3), (256, 64, 2, 8, 2), (256, 64, 4, 8, 3),
            (128, 128, 2, 8, 2), (64, 128, 1, 4, 3), (64, 64, 2, 4, 4), (32, 64, 4, 4, 3),
        ]  # fmt: skip
        return _configs(
            grad_sb.GradSBConfig, "block_m block_n split_n num_warps num_stages",
            [r for r in rows if r[0] <= max(16, 2 * M)],
        )  # fmt: skip
    if op == "grad_a":
        rows = [
            (64, 64, 1, 4, 3), (64, 64, 2, 4, 3), (64, 64, 4, 4, 3), (128, 64, 4, 4, 3),
            (64, 128, 4, 4, 3), (64, 128, 8, 4, 3), (128, 32, 2, 4, 4), (64, 32, 2, 4, 4),
            (64, 64, 8, 4, 4), (64, 64, 16, 4, 3), (128, 128, 8, 8, 2),
        ]  # fmt: skip
        return _configs(
            grad_a.GradAConfig, "block_m block_k split_m num_warps num_stages",
            [r for r in rows if r[2] * r[0] <= max(64, M)],
        )  # fmt: skip
    if op in ("gemm", "gemm_grad_input"):
        rows = [
            (128, 256, 64, 16, 8, True, True, 8, 3), (128, 256, 64, 16, 8, True, False, 8, 3),
            (128, 256, 64, 16, 8, True, False, 8, 4), (128, 128, 64, 16, 8, True, True, 8, 4),
            (128, 128, 64, 16, 8, True, False, 4, 4), (128, 128, 128, 16, 8, True, False, 8, 3),
            (256, 128, 64, 16, 8, True, True, 8, 3), (128, 256, 64, 16, 16, True, True, 8, 3),
            (64, 256, 64, 16, 8, True, False, 4, 4), (64, 128, 64, 16, 8, True, False, 4, 4),
            (128, 128, 64, 16, 8, False, False, 8, 3), (64, 128, 64, 16, 8, False, False, 4, 4),
        ]  # fmt: skip
        names = "block_m block_n block_k block_r group_m tma flatten num_warps num_stages"
        rows = [r for r in rows if (r[0] <= M or r[0] <= 64) and (case.r <= 16 or not r[6])]
        return _configs(gemm.GemmConfig, names, rows)
    if op == "decode":
        one = [(4, 512, 8, 3), (8, 512, 8, 3), (16, 512, 8, 3), (4, 1024, 8, 2), (8, 256, 4, 3),
               (16, 256, 4, 3), (4, 512, 4, 4), (2, 1024, 8, 3)]  # fmt: skip
        few = [(16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 3), (32, 256, 8, 3), (64, 128, 4, 3),
               (64, 64, 4, 4), (16, 256, 2, 3), (32, 64, 4, 5)]  # fmt: skip
        return _configs(
            decode.DecodeConfig, "block_n block_k num_warps num_stages", one if M == 1 else few
        )
    return []


def race_cases() -> list[RaceCase]:
    """The buckets, ordered by what a training step of Llama-8B spends its time on."""
    h, wide, kv = LLAMA_8B.hidden, LLAMA_8B.wide, LLAMA_8B.kv

    def low_rank(M: int, r: int, mask: bool, size: int) -> Iterator[RaceCase]:
        yield RaceCase("shrink", M, 0, size, r, mask)
        yield RaceCase("low_rank_grad_input", M, 0, size, r, mask)
        yield RaceCase("grad_a", M, 0, size, r, mask)
        if not mask:
            yield RaceCase("expand", M, size, 0, r)
            yield RaceCase("grad_sb", M, size, 0, r)

    def joined(M: int, r: int, mask: bool, k: int, *ns: int) -> Iterator[RaceCase]:
        if grad_xa.fits([r] * len(ns)):
            yield RaceCase("shrink_expand", M, sum(ns), k, r, mask, group=len(ns), ns=ns)
            yield RaceCase("grad_xa", M, 0, k, r, mask, group=len(ns))

    def products(M: int, r: int, n: int, k: int) -> Iterator[RaceCase]:
        yield RaceCase("gemm", M, n, k, r)
        yield RaceCase("gemm_grad_input", M, n, k, r, True)
        yield RaceCase("gemm_grad_input", M, n, k, r, False)

    def train(M: int, r: int, k: int, *ns: int) -> Iterator[RaceCase]:
        for mask in (True, False):
            for op in ("forward", "backward"):
                yield RaceCase(op, M, sum(ns), k, r, mask, group=len(ns), ns=ns)

    def infer(M: int, r: int, k: int, n: int) -> Iterator[RaceCase]:
        for graph in (True, False) if M <= decode.MAX_ROWS else (False,):
            yield RaceCase("infer", M, n, k, r, ns=(n,), graph=graph)

    def order() -> Iterator[RaceCase]:
        for M in (8192, 2048):
            for mask in (True, False):
                yield from low_rank(M, 16, mask, h)
                yield from joined(M, 16, mask, h, h)
            yield from products(M, 16, h, h)
            yield from train(M, 16, h, h)
        for M in (1, 16):
            for n, k in ((h, h), (wide, h), (h, wide), (kv, h)):
                yield RaceCase("decode", M, n, k, 16)
                yield from infer(M, 16, k, n)
        for size in (wide, kv):
            for mask in (True, False):
                yield from low_rank(8192, 16, mask, size)
        for n, k in ((wide, h), (h, wide), (kv, h)):
            yield from products(8192, 16, n, k)
            yield from train(8192, 16, k, n)
        for M in (512, 128):
            for mask in (True, False):
                yield from low_rank(M, 16, mask, h)
            yield from products(M, 16, h, h)
            yield from train(M, 16, h, h)
            yield from infer(M, 16, h, h)
        for mask in (True, False):  # q, k, v share X
            yield RaceCase("shrink", 8192, 0, h, 16, mask, group=3)
            yield RaceCase("grad_a", 8192, 0, h, 16, mask, group=3)
            yield RaceCase("low_rank_grad_input", 8192, 0, h, 16, mask, group=3)
            yield from joined(8192, 16, mask, h, h, kv, kv)
            yield from joined(8192, 16, mask, h, wide, wide)
        for M in (8192, 2048):
            yield from train(M, 16, h, h, kv, kv)
            yield from train(M, 16, h, wide, wide)  # gate and up
        for r in (64, 128, 8):
            for mask in (True, False):
                yield from low_rank(8192, r, mask, h)
                yield from joined(8192, r, mask, h, h)
            yield from products(8192, r, h, h)
            yield from train(8192, r, h, h)
        for M in (8192, 2048):
            for mask in (True, False):
                yield from low_rank(M, 16, mask, LLAMA_70B.hidden)
            yield from products(M, 16, LLAMA_70B.hidden, LLAMA_70B.hidden)
            yield from train(M, 16, LLAMA_70B.hidden, LLAMA_70B.hidden)
        for M in (1, 16):
            for r in (64, 128, 8):
                yield RaceCase("decode", M, h, h, r)
                yield from infer(M, r, h, h)

    return list(dict.fromkeys(order()))


def contest(case: RaceCase, device: Device, copies: int) -> Contest:
    """Tensors and launches for a case of :func:`race_cases`."""
    if case.whole:
        return whole(case, device, copies)
    torch.manual_seed(3)
    dtype, adapter = (getattr(torch, d) for d in (case.dtype, case.adapter_dtype))
    M, N, K, r, G = case.m, case.n, case.k, case.r, case.group

    def some(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> list[Tensor]:
        return [randn(device, *shape, dtype=dtype, scale=scale) for _ in range(copies)]

    def adapters(*shape: int) -> list[Tensor]:  # bf16 values, whatever dtype holds them
        return [t.bfloat16().to(adapter) for t in some(*shape, dtype=torch.float32, scale=0.1)]

    words = keeps = None
    if case.mask:
        words = list(bits.dropout_bits(M, K, 0.1, 11, groups=G, device=device.torch))
        keeps = [bits.unpack_bits(w, K) for w in words]
    none = [None] * G
    entrants: dict[str, Any] = {"default": None}
    entrants |= {_label(c): c for c in config_list(case)}
    if case.op == "shrink":
        x, As = some(M, K), [adapters(r, K) for _ in range(G)]
        return Contest(
            lambda c, i: [shrink.shrink(x[i], [a[i] for a in As], SCALE, words, config=c)],
            lambda: [
                torch.cat(
                    [
                        reference.shrink(x[0], a[0], SCALE, m)
                        for a, m in zip(As, keeps or none, strict=True)
                    ],
                    dim=1,
                )
            ],
            entrants,
        )
    if case.op == "expand":
        s, b = some(M, r), adapters(N, r)
        return Contest(
            lambda c, i: [expand.expand(s[i], b[i], config=c)],
            lambda: [reference.expand(s[0], b[0])],
            entrants,
        )
    if case.op == "low_rank_grad_input":
        ds, As = [some(M, r) for _ in range(G)], [adapters(r, K) for _ in range(G)]
        return Contest(
            lambda c, i: [
                expand.low_rank_grad_input([d[i] for d in ds], [a[i] for a in As], words, config=c)
            ],
            lambda: [
                reference.low_rank_grad_input([d[0] for d in ds], [a[0] for a in As], keeps or none)
            ],
            entrants,
        )
    if case.op == "shrink_expand":
        x, As = some(M, K), [adapters(r, K) for _ in range(G)]
        Bs = [adapters(n, r) for n in case.ns]

        def joined_exact() -> list[Tensor]:
            pairs = zip(As, keeps or none, strict=True)
            parts = [reference.shrink(x[0], a[0], SCALE, m) for a, m in pairs]
            ys = [reference.expand(s, b[0]) for s, b in zip(parts, Bs, strict=True)]
            return [torch.cat(parts, dim=1), *ys]

        def joined(c: Any, i: int) -> list[Tensor]:
            each = [a[i] for a in As], [b[i] for b in Bs]
            s, ys = shrink_expand.shrink_expand(x[i], *each, SCALE, words, config=c)
            return [s, *ys]

        return Contest(joined, joined_exact, entrants)
    if case.op == "grad_xa":
        x, ds = some(M, K), [some(M, r) for _ in range(G)]
        As = [adapters(r, K) for _ in range(G)]

        def paired(c: Any, i: int) -> list[Tensor]:
            d, das = grad_xa.grad_xa(x[i], [d[i] for d in ds], [a[i] for a in As], words, config=c)
            return [d, *das]

        def paired_exact() -> list[Tensor]:
            masks, first = keeps or none, [d[0] for d in ds]
            d = reference.low_rank_grad_input(first, [a[0] for a in As], masks)
            das = [reference.grad_a(x[0], v, m) for v, m in zip(first, masks, strict=True)]
            return [d, *das]

        return Contest(paired, paired_exact, entrants)
    if case.op == "grad_sb":
        dy, b, s = some(M, N), adapters(N, r), some(M, r)
        return Contest(
            lambda c, i: list(grad_sb.grad_sb(dy[i], b[i], s[i], SCALE, config=c)),
            lambda: [reference.grad_s(dy[0], b[0], SCALE), reference.grad_b(dy[0], s[0])],
            entrants | {grad_sb.TWO_PASS: grad_sb.TWO_PASS},
        )
    if case.op == "grad_a":
        x, ds = some(M, K), [some(M, r) for _ in range(G)]
        return Contest(
            lambda c, i: grad_a.grad_a(x[i], [d[i] for d in ds], words, config=c),
            lambda: [
                reference.grad_a(x[0], d[0], m) for d, m in zip(ds, keeps or none, strict=True)
            ],
            entrants,
        )
    weights = some(N, K, scale=K**-0.5)
    if case.op == "gemm":
        x, s, b = some(M, K), some(M, r), adapters(N, r)
        return Contest(
            lambda c, i: [gemm.fused_linear(x[i], weights[i], s[i], b[i], config=c)],
            lambda: [reference.linear(x[0], weights[0], s[0], b[0])],
            entrants,
        )
    if case.op == "gemm_grad_input":
        dy, ds, a = some(M, N), some(M, r), adapters(r, K)
        keep = keeps[0] if keeps else None
        return Contest(
            lambda c, i: [
                gemm.fused_grad_input([dy[i]], [weights[i]], [ds[i]], [a[i]], words, config=c)
            ],
            lambda: [reference.grad_input([dy[0]], [weights[0]], [ds[0]], [a[0]], [keep])],
            entrants,
        )
    if case.op == "decode":
        x, a, b = some(M, K), adapters(r, K), adapters(N, r)
        return Contest(
            lambda c, i: [decode.decode(x[i], weights[i], a[i], b[i], SCALE, config=c)],
            lambda: [reference.linear(x[0], weights[0], reference.shrink(x[0], a[0], SCALE), b[0])],
            entrants,
        )
    raise ValueError(f"op {case.op} is not raced")


def _label(config: Any) -> str:
    return " ".join(f"{k}={int(v)}" for k, v in asdict(config).items())
