"""The races of the kernels of a mixture: cases, candidates, tensors, and launches of a config.

A case's m is its tokens, and ``what`` has what :func:`peftkern.ops.experts.configs.told` says of
it. Candidates are all combinations of a few values of each field; one that a kernel refuses, or
that does not fit a GPU, is thrown out where it is raced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import (
    experts_gate,
    experts_gate_grad,
    experts_gate_reference,
    experts_gemm,
    experts_grad,
    experts_reference,
    experts_shrink,
)
from peftkern.kernels.common import Arch, Launch, cdiv, next_pow2, padded
from peftkern.kernels.experts_decode import (
    MAX_PAIRS,
    ExpertsDecodeConfig,
    FewLinear,
    decode,
    plan_decode,
)
from peftkern.kernels.experts_route import Route, route, rows_of_tile
from peftkern.ops.experts.configs import told

from ..gpu.contest import SCALE, RaceCase
from .entry import FP32, INT32, Bucket, Drawn, Exact, Raced, Run, TableTensors, meta
from .experts import Layer, meta_route

GATE = "silu"
Shape = tuple[int, int, bool, bool]  # n, k, whether rows are gathered, and masked


def _case(op: str, b: Bucket, n: int, k: int, gather: bool, mask: bool) -> RaceCase:
    what = told(op, rows_of_tile(b.M * b.top, b.experts), gather, b.layout)
    return RaceCase(op, b.M, n, k, b.r, mask, experts=b.experts, top=b.top, what=what)


def _cases(op: str, shapes: Callable[[int, int, bool], list[Shape]], few: bool = False) -> Any:
    """Cases of the shapes that a function gives of (width, inner width, mask)."""

    def cases(b: Bucket) -> Iterator[RaceCase]:
        if (b.M * b.top <= MAX_PAIRS) == few:
            for shape in shapes(b.K, b.Ns[0], b.mask):
                yield _case(op, b, *shape)

    return cases


def _gathers(what: str) -> bool:
    return what.endswith("gather")


def _layout(what: str) -> str:
    return what.split()[-1]


def _routed(case: RaceCase, x: Tensor) -> tuple[Route, Tensor]:
    """(route, index) of tokens that choose every expert equally often, on the device of x."""
    scores = torch.rand(case.m, case.experts, device=x.device)
    index = scores.topk(case.top, 1).indices
    return route(index, case.experts, rows_of_tile(case.rows, case.experts)), index


def _meta_route(t: TableTensors) -> Route:
    key = t.key
    rows = int(key.grads.split()[0])
    return meta_route(Layer(key.m, key.top, key.experts, key.k, key.k), key.group, rows)


def _words(t: TableTensors, where: Route) -> Tensor | None:
    return meta(where.P, cdiv(t.key.k, 32), dtype=INT32) if t.key.mask else None


def _rows(t: TableTensors, where: Route, columns: int) -> Tensor:
    rows = t.key.m if _gathers(t.key.grads) else where.P
    return meta(rows, columns, dtype=t.dtype)


# ------------------------------------------------------------------------------- the products


def _gemm_candidates(case: RaceCase) -> list[Any]:
    """Tiles that are no wider than Y."""
    columns = case.k if case.op.endswith("input") else case.n
    tall, block_r = int(case.what.split()[0]), min(64, padded(case.r))
    return [
        experts_gemm.ExpertsGemmConfig(
            block_n, 64, block_r, tma=tma, num_stages=stages,
            num_warps=8 if tall * block_n >= 128 * 128 else 4,
        )
        for block_n, tma, stages in product((64, 128, 256), (False, True), (3, 4))
        if block_n <= max(64, next_pow2(columns))
    ]  # fmt: skip


def _gemm(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    """The forward, or as the gradient of the input the same with W and A transposed."""
    E, n, k, back = case.experts, case.n, case.k, case.op.endswith("input")
    gather = _gathers(case.what)
    w = t.some(E, n, k, scale=(n if back else k) ** -0.5)
    x = t.some(case.m if gather else case.rows, n if back else k)
    where, _ = _routed(case, x[0])
    s = t.some(case.rows, case.r, scale=0.1)
    low = t.adapters(E, case.r, k) if back else t.adapters(E, n, case.r)
    words = None if t.words is None else t.words[0]

    def turned(ts: Sequence[Tensor], i: int) -> Tensor:
        return ts[i].transpose(1, 2) if back else ts[i]

    def arguments(i: int) -> tuple[Any, ...]:
        return x[i], where, turned(w, i), s[i], [turned(low, i)]

    def run(config: Any, i: int) -> list[Tensor]:
        places: Any = dict(gather=gather, scatter=not gather)
        return [experts_gemm.gemm(*arguments(i), **places, bits=words, config=config)]

    def exact() -> list[Tensor]:
        keep = t.keeps[0]
        return [experts_reference.gemm(*arguments(0), gather=gather, scatter=not gather, keep=keep)]

    return run, exact


def _plan_gemm(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where, back = t.key, _meta_route(t), t.key.op.endswith("input")
    E, n, k, gather = key.experts, key.n, key.k, _gathers(key.grads)
    w, low = meta(E, n, k, dtype=t.dtype), meta(E, n, key.r, dtype=t.adapter)
    if back:
        w, low = w.transpose(1, 2), meta(E, key.r, k, dtype=t.adapter).transpose(1, 2)
    y, x = meta(where.P, k if back else n, dtype=t.dtype), _rows(t, where, n if back else k)
    s, words = meta(where.P, key.r, dtype=t.dtype) if key.r else None, _words(t, where)
    return experts_gemm.plan_gemm(
        y, x, where, w, s, [low] * key.group if key.r else [], None, words if back else None,
        gather, not gather, arch, config,
    )  # fmt: skip


# ---------------------------------------------------------------------------- S, H and factors


def _shrink_candidates(case: RaceCase) -> list[Any]:
    warps = 8 if case.r > 64 else 4
    return [
        experts_shrink.ExpertsShrinkConfig(block_m, block_k, split, warps, 3)
        for block_m, block_k, split in product((16, 32, 64), (64, 128), (1, 4))
    ]


def _shrink(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    gather = _gathers(case.what)
    x, a = t.some(case.m if gather else case.rows, case.k), t.adapters(case.experts, case.r, case.k)
    where, _ = _routed(case, x[0])
    words = None if t.words is None else t.words[0]

    def run(config: Any, i: int) -> list[Tensor]:
        given: Any = dict(gather=gather, bits=words, config=config)
        return [experts_shrink.shrink(x[i], where, [a[i]], SCALE, **given)]

    return run, lambda: [experts_reference.shrink(x[0], where, [a[0]], [SCALE], gather, t.keeps[0])]


def _plan_shrink(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where = t.key, _meta_route(t)
    a = [meta(key.experts, key.r, key.k, dtype=t.adapter)] * key.group
    x, out = _rows(t, where, key.k), meta(where.P, key.r, dtype=t.dtype)
    return experts_shrink.plan_shrink(
        x, where, a, [1.0] * key.group, _gathers(key.grads), _words(t, where), out, config
    )


def _gate_candidates(case: RaceCase) -> list[Any]:
    warps = 8 if case.r > 32 else 4
    return [
        experts_gate.ExpertsGateConfig(block_m, block_k, split, warps, 3)
        for block_m, block_k, split in product((16, 32, 64), (64, 128), (1, 2))
    ]


def _gate(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    layout = _layout(case.what)
    gu, a = t.some(case.rows, 2 * case.k), t.adapters(case.experts, case.r, case.k)
    where, _ = _routed(case, gu[0])
    words = None if t.words is None else t.words[0]

    def run(config: Any, i: int) -> list[Tensor]:
        h, s = experts_gate.gate(
            gu[i], where, GATE, layout, [a[i]], SCALE, words, config=config
        )  # fmt: skip
        return [h, s] if s is not None else [h]

    def exact() -> list[Tensor]:
        found = experts_gate_reference.gate(
            gu[0], where, GATE, layout, [a[0]], [SCALE], t.keeps[0]
        )  # fmt: skip
        return [u for u in found if u is not None]

    return run, exact


def _plan_gate(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where = t.key, _meta_route(t)
    layout = _layout(key.grads)
    As = [meta(key.experts, key.r, key.k, dtype=t.adapter)] * key.group if key.r else None
    s = meta(where.P, key.r, dtype=t.dtype) if key.r else None
    gu = meta(where.P, key.k if layout == "alone" else 2 * key.k, dtype=t.dtype)
    h, scales = meta(where.P, key.k, dtype=t.dtype), [1.0] * key.group if key.r else []
    words = _words(t, where) if key.r else None
    return experts_gate.plan_gate(
        gu, where, GATE, layout, h, As, words, scales, s, None, config
    )  # fmt: skip


def _gate_grad_candidates(case: RaceCase) -> list[Any]:
    r = min(64, padded(max(1, case.r)))
    return [
        experts_gate_grad.ExpertsGateGradConfig(block_m, block_k, r, r, warps, stages)
        for block_m, block_k, warps, stages in product((16, 32), (64, 128), (4, 8), (3,))
    ]


def _gate_grad(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    P, k, layout = case.rows, case.k, _layout(case.what)
    dh, gu = t.some(P, k), t.some(P, 2 * k)
    where, _ = _routed(case, gu[0])
    weights, s = t.some(case.m, case.top, dtype=FP32), t.some(P, case.r, scale=0.1)
    b, down = t.adapters(case.experts, 2 * k, case.r), t.some(P, case.r, scale=0.1)
    words = None if t.words is None else t.words[0]

    def arguments(i: int) -> tuple[Any, ...]:
        return dh[i], gu[i], where, GATE, layout, weights[i], b[i], s[i], SCALE

    def run(config: Any, i: int) -> list[Tensor]:
        given: Any = dict(ds_down=down[i], bits=words, config=config)
        found = experts_gate_grad.gate_grad(*arguments(i), **given)
        return [u for u in found if u is not None]

    def exact() -> list[Tensor]:
        given: Any = dict(ds_down=down[0], keep=t.keeps[0])
        found = experts_gate_reference.gate_grad(*arguments(0), **given)
        return [u for u in found if u is not None]

    return run, exact


def _plan_gate_grad(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where = t.key, _meta_route(t)
    P, E, r, layout = where.P, key.experts, key.r, _layout(key.grads)
    N = key.k if layout == "alone" else 2 * key.k
    b = meta(E, N, r, dtype=t.adapter) if r else None
    s = meta(P, r, dtype=t.dtype) if r else None
    out = experts_gate_grad.ExpertsGateGrads(
        meta(P, N, dtype=t.dtype), meta(P, dtype=FP32), meta(P, r, dtype=t.dtype) if r else None,
        meta(E, N, r, dtype=FP32) if r else None, meta(E, r, key.k, dtype=FP32) if r else None,
    )  # fmt: skip
    words = _words(t, where) if r else None
    return experts_gate_grad.plan_gate_grad(
        meta(P, key.k, dtype=t.dtype), meta(P, N, dtype=t.dtype), where, GATE, layout,
        meta(key.m, key.top, dtype=FP32), b, s, 1.0, None, s, words, out, config, arch,
    )  # fmt: skip


def _grad_candidates(case: RaceCase) -> list[Any]:
    return [
        experts_grad.ExpertsGradConfig(block_m, block_c, 8 if block_c > 64 else 4, stages)
        for block_m, block_c, stages in product((32, 64), (64, 128, 256), (3, 5))
    ]


def _grad_sb(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    gather = _gathers(case.what)
    dy, s = t.some(case.m if gather else case.rows, case.n), t.some(case.rows, case.r, scale=0.1)
    where, _ = _routed(case, dy[0])
    b, w = t.adapters(case.experts, case.n, case.r), t.some(case.m, case.top, dtype=FP32)
    weights: list[Any] = w if gather else [None] * len(w)

    def run(config: Any, i: int) -> list[Tensor]:
        given: Any = dict(gather=gather, row_weight=weights[i], config=config)
        return list(experts_grad.grad_sb(dy[i], where, b[i], s[i], SCALE, **given))

    def exact() -> list[Tensor]:
        ds = experts_reference.grad_s(dy[0], where, b[0], SCALE, gather)
        return [ds, experts_reference.grad_b(dy[0], where, s[0], gather, weights[0])]

    return run, exact


def _plan_grad_sb(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where = t.key, _meta_route(t)
    P, E, gather = where.P, key.experts, _gathers(key.grads)
    b, db = (meta(E, key.n, key.r, dtype=d) for d in (t.adapter, FP32))
    s, ds = (meta(P, key.r, dtype=t.dtype) for _ in range(2))
    weights = meta(P, dtype=FP32) if gather else None
    return experts_grad.plan_grad_sb(
        _rows(t, where, key.n), where, b, s, 1.0, gather, weights, ds, db, config
    )


def _grad_a(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    gather = _gathers(case.what)
    ds, x = t.some(case.rows, case.r), t.some(case.m if gather else case.rows, case.k)
    where, _ = _routed(case, x[0])
    w = t.some(case.m, case.top, dtype=FP32)
    weights: list[Any] = [None] * len(w) if gather else w
    words = None if t.words is None else t.words[0]

    def run(config: Any, i: int) -> list[Tensor]:
        given: Any = dict(gather=gather, row_weight=weights[i], bits=words, config=config)
        return [experts_grad.grad_a(ds[i], x[i], where, **given)]

    return run, lambda: [
        experts_reference.grad_a(ds[0], x[0], where, gather, weights[0], t.keeps[0])
    ]


def _plan_grad_a(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key, where = t.key, _meta_route(t)
    gather = _gathers(key.grads)
    ds, out = meta(where.P, key.r, dtype=t.dtype), meta(key.experts, key.r, key.k, dtype=FP32)
    weights = None if gather else meta(where.P, dtype=FP32)
    return experts_grad.plan_grad_a(
        ds, _rows(t, where, key.k), where, gather, weights, _words(t, where), out, config
    )


# ------------------------------------------------------------------------------------ few pairs


def _decode_candidates(case: RaceCase) -> list[Any]:
    return [
        ExpertsDecodeConfig(n, k, n, k, warps)
        for n, k, warps in product((8, 16, 32), (128, 256), (4, 8))
    ]


def _decode(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    E, N1, D, r, layout = case.experts, case.n, case.k, case.r, _layout(case.what)
    width = N1 // 2
    x, weights = t.some(case.m, D), t.some(case.m, case.top, dtype=FP32)
    _, index = _routed(case, x[0])
    parts = [
        (t.some(E, n, k, scale=k**-0.5), t.adapters(E, r, k), t.adapters(E, n, r))
        for n, k in ((N1, D), (D, width))
    ]

    def run(config: Any, i: int) -> list[Tensor]:
        up, down = (FewLinear(w[i], None, [a[i]], [b[i]], [SCALE]) for w, a, b in parts)
        return [decode(x[i], index, weights[i], up, down, GATE, layout, config=config)]

    def exact() -> list[Tensor]:
        y = x[0].new_zeros((case.m, D), dtype=torch.float64)
        for token, chosen in enumerate(index.tolist()):
            for j, e in enumerate(chosen):
                h = x[0][token].double()[None]
                for i, (w, a, b) in enumerate(parts):
                    A, B = a[0][e].double(), b[0][e].double()
                    h = h @ w[0][e].double().T + SCALE * (h @ A.T) @ B.T
                    h = h if i else experts_gate_reference.hidden(h, GATE, layout)
                y[token] += weights[0][token, j].double() * h[0]
        return [y]

    return run, exact


def _plan_decode(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    key = t.key
    E, N1, D, r, layout = key.experts, key.n, key.k, key.r, _layout(key.grads)
    width = N1 if layout == "alone" else N1 // 2

    def linear(n: int, k: int) -> FewLinear:
        a, b = meta(E, r, k, dtype=t.adapter), meta(E, n, r, dtype=t.adapter)
        count = key.group if r else 0
        return FewLinear(
            meta(E, n, k, dtype=t.dtype), None, [a] * count, [b] * count, [1.0] * count
        )

    choice = meta(key.m, dtype=INT32) if key.group > 1 else None
    index, weights = meta(key.m, key.top, dtype=INT32), meta(key.m, key.top, dtype=FP32)
    y = meta(key.m, D, dtype=t.dtype)
    return plan_decode(
        t("m", "k"), index, weights, linear(N1, D), linear(D, width), GATE, layout, choice, None, y,
        config, arch,
    )  # fmt: skip


# ---------------------------------------------------------------------------------- the races


def _raced(
    op: str, shapes: Any, candidates: Any, contest: Any, plan: Any, few: bool = False
) -> dict[str, Raced]:
    return {op: Raced("experts", _cases(op, shapes, few), candidates, contest, plan)}


GEMM = _raced(
    "experts_gemm", lambda D, inner, mask: [(2 * inner, D, True, False), (D, inner, False, False)],
    _gemm_candidates, _gemm, _plan_gemm,
) | _raced(
    "experts_gemm_grad_input",
    lambda D, inner, mask: [(D, inner, True, mask), (2 * inner, D, False, mask)],
    _gemm_candidates, _gemm, _plan_gemm,
)  # fmt: skip
SHRINK = _raced(
    "experts_shrink", lambda D, inner, mask: [(0, D, True, mask)],
    _shrink_candidates, _shrink, _plan_shrink,
)  # fmt: skip
GATES = _raced(
    "experts_gate", lambda D, inner, mask: [(0, inner, False, mask)],
    _gate_candidates, _gate, _plan_gate,
)  # fmt: skip
GATE_GRAD = _raced(
    "experts_gate_grad", lambda D, inner, mask: [(0, inner, False, mask)],
    _gate_grad_candidates, _gate_grad, _plan_gate_grad,
)  # fmt: skip
GRAD = _raced(
    "experts_grad_sb", lambda D, inner, mask: [(D, 0, True, False)],
    _grad_candidates, _grad_sb, _plan_grad_sb,
) | _raced(
    "experts_grad_a", lambda D, inner, mask: [(0, D, True, mask), (0, inner, False, mask)],
    _grad_candidates, _grad_a, _plan_grad_a,
)  # fmt: skip
DECODE = _raced(
    "experts_decode", lambda D, inner, mask: [(2 * inner, D, False, False)],
    _decode_candidates, _decode, _plan_decode, few=True,
)  # fmt: skip
