"""The LoRA linear on the Triton kernels of ``kernels/``; signatures as in :mod:`.torch_backend`.

Calls that the kernels do not take (float64, ranks above 256, a CPU outside Triton's interpreter) go
to the torch backend, with the reason from :func:`why_not`. Kernels run with the configs that a
tuning table has for this GPU, or else with their own defaults (:mod:`.tuned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.checks import DTYPES, MAX_RANK
from ..kernels.common import INTERPRET, arch_of, next_pow2
from ..kernels.decode import MAX_ROWS, decode_group
from ..kernels.expand import expand, low_rank_grad_input
from ..kernels.gemm import fused_grad_input, fused_linear
from ..kernels.grad_a import grad_a
from ..kernels.grad_sb import grad_sb_group
from ..kernels.grad_xa import fits as grad_xa_fits
from ..kernels.grad_xa import grad_xa
from ..kernels.mixed import MAX_ADAPTERS
from ..kernels.mixed import mixed as _mixed
from ..kernels.shrink import draws, shrink
from ..kernels.shrink_expand import fits as shrink_expand_fits
from ..kernels.shrink_expand import shrink_expand
from ..kernels.switches import tf32
from . import fp8_copies, fp8_triton, quantised_triton, torch_backend, tuned
from .device import on_its_device
from .masks import draw as draw
from .masks import to_draw
from .notes import note_once
from .projection import Projection, ProjectionGrad
from .quantised_triton import base_product, dense

# The ways to add the update to the base product:
#   hybrid   the low-rank part is written, the vendor's product accumulates onto it
#   joined   the same, written by the kernel that makes S (backward: dA), in one launch less;
#            hybrid if that kernel does not take the ranks
#   fused    one kernel of ours computes both products
# With ``how=None`` an operation takes ``product``, or if that is None the fastest way in this GPU's
# tables, or else the one for its shape.
PRODUCTS = ("hybrid", "joined", "fused")
product: str | None = None
# without gradients and for up to MAX_ROWS rows, kernels that stream W can also compute everything
INFER = ("decode", *PRODUCTS)
# and then projections of one x are computed together
group_rows = MAX_ROWS

_TO_TORCH = "the Triton backend hands a call to torch: %s"


def why_not(x: Tensor, A: Tensor) -> str | None:
    """The reason that a call goes to the torch backend; None when the kernels take it."""
    return refusal(x, A.dtype, A.shape[0])


def refusal(x: Tensor, adapter: torch.dtype, r: int) -> str | None:
    """The same reason for adapters of this dtype and rank."""
    if not (x.is_cuda or INTERPRET.value):
        return f"the tensors are on {x.device.type}, and Triton's interpreter is off"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if r > MAX_RANK:
        return f"rank {r} is above {MAX_RANK}"
    if adapter not in (x.dtype, torch.float32):
        return f"adapters in {adapter} under {x.dtype}"
    return None


def _declines(x: Tensor, A: Tensor) -> bool:
    reason = refusal(x, A.dtype, A.shape[0])
    if reason is not None:
        note_once(_TO_TORCH, reason)
    return reason is not None


class _Group(NamedTuple):
    """The facts of projections that kernels take together."""

    like: Tensor  # M rows in the activations' dtype
    adapter: torch.dtype
    ranks: list[int]
    masked: bool

    def config(self, op: str, n: int, k: int) -> Any:
        """The config of a kernel that computes all of them; None without one in a table."""
        count = len(self.ranks)
        return tuned.config(op, self.like, self.adapter, n, k, max(self.ranks), count, self.masked)

    def order(self, how: str | None, n: int, k: int, grads: str = "") -> str:
        """The way of PRODUCTS to take."""
        how = how or product
        if how is None:
            key = tuned.key_of(
                "backward" if grads else "forward", self.like.dtype, self.adapter,
                self.like.shape[0], n, k, max(self.ranks), len(self.ranks), self.masked, grads,
            )  # fmt: skip
            how = tuned.best_of(PRODUCTS, key, self.like)
        if how == "joined" or how is None:
            held = grad_xa_fits(self.ranks)
            if how is None and held:
                held = shrink_expand_fits(self.like.shape[0], self.ranks, arch_of(self.like.device))
            return "joined" if held else "hybrid"
        return how


def low_rank_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of S."""
    return x.dtype if why_not(x, A) is None else torch_backend.low_rank_dtype(x, A)


@on_its_device
def forward(
    x: Tensor,
    members: list[Projection],
    words: list[Tensor | None] | None = None,
    how: str | None = None,
    apart: bool = False,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of projections of one x [M, K], which is read once for all S_i.

    The masks are ``words`` if given, else drawn, where possible by the kernel that makes S; ``how``
    is one of ``PRODUCTS``. ``apart``: Y_i are without S_i B_iᵀ, for callers that have asked
    :func:`.mlp_apart.outputs`.
    """
    As, Bs, ps, scales, biases, masked = [], [], [], [], [], False
    for _, bias, A, B, scale, p, _ in members:  # one loop: a list of each would cost more
        if _declines(x, A):
            return torch_backend.forward(x, members, words)
        As.append(A)
        Bs.append(B)
        ps.append(p)
        scales.append(scale / (1.0 - p))
        biases.append(bias)
        if p > 0.0:
            masked = True
    if words is not None:
        masked = any([bits is not None for bits in words])
    how = fp8_copies.order([m.weight for m in members], how)
    facts = _facts("forward", how, x, masked, As, Bs)
    way: _Way = tuned.decided(x, facts, _forward_way, x, members, masked, how)
    drawn = None
    if words is None and masked:
        plain: Any = biases[0] is None
        if len(biases) > 1:
            plain = tuple([bias is None for bias in biases])
        words, drawn = to_draw(x, ps, way.draws, (way.order, facts, plain))
    elif words is None:
        words = [None] * len(members)
    if way.order == "joined":
        s, ys = shrink_expand(x, As, Bs, scales, words, biases, draw=drawn, config=way.first)
        if len(members) == 1:
            return [(base_product(x, members[0].w, ys[0]), s, words[0])]
        ys = [base_product(x, m.w, y) for y, m in zip(ys, members, strict=True)]
        return list(zip(ys, _columns(s, As), words, strict=True))
    if way.order == fp8_copies.ORDER:
        s, ys = fp8_triton.forward(x, members, scales, words, drawn, apart)
        return list(zip(ys, _columns(s, As), words, strict=True))
    done = []
    parts = _columns(shrink(x, As, scales, words, draw=drawn, config=way.first), As)
    for m, s, bits, config in zip(members, parts, words, way.each, strict=True):
        if way.order == "fused":
            y = fused_linear(x, dense(m.w).t(), s, m.B, m.bias, config=config)
        else:
            y = base_product(x, m.w, expand(s, m.B, m.bias, config=config))
        done.append((y, s, bits))
    return done


def _columns(s: Tensor, As: list[Tensor]) -> Sequence[Tensor]:
    """S of each adapter, from S of all."""
    return [s] if len(As) == 1 else s.split([a.shape[0] for a in As], 1)


class _Way(NamedTuple):
    """How the kernels run a call: the order, of PRODUCTS, and the configs from a table, or None."""

    order: str
    first: Any  # of the kernel that reads X for all; backward: of the one that makes dA
    each: list[Any]  # of the kernel of each projection
    draws: bool = False  # forward: one launch makes all of S, and can draw the masks
    last: Any = None  # backward: of the one that makes dX apart from dA


def _facts(
    op: str, how: str | None, like: Tensor, more: Any, As: list[Tensor], Bs: list[Tensor]
) -> tuple[Any, ...]:
    """All that a decision depends on, besides the tables of the device."""
    dtype = like.dtype
    facts = [op, how or product, dtype, dtype is torch.float32 and tf32(), like.shape[0], more]
    for a, b in zip(As, Bs):  # noqa: B905  # checking costs time
        facts += a.dtype, a.shape, b.dtype, b.shape[0]
    return tuple(facts)


def _forward_way(x: Tensor, members: list[Projection], masked: bool, how: str | None) -> _Way:
    K, low, n = x.shape[1], members[0].A.dtype, sum(m.B.shape[0] for m in members)
    group = _Group(x, low, [m.A.shape[0] for m in members], masked)
    order = group.order(how, n, K)
    if order == "joined":
        return _Way(order, group.config("shrink_expand", n, K), [], draws(group.ranks))
    if order == fp8_copies.ORDER:
        return _Way(order, None, [], draws(group.ranks))
    op, k = ("gemm", K) if order == "fused" else ("expand", 0)
    each = [tuned.config(op, x, low, m.B.shape[0], k, m.B.shape[1]) for m in members]
    return _Way(order, group.config("shrink", 0, K), each, draws(group.ranks))


@on_its_device
def backward(
    x: Tensor,
    members: list[ProjectionGrad],
    needs_x: bool,
    given: list[Tensor] | None = None,
    how: str | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dX [M, K], summed over all projections; (dA_i, dB_i) of each).

    X is read once for all dA_i. Two calls with the same tensors agree bit for bit. ``given`` has
    dS_i if they are made already; then dB_i are not.
    """
    if any([_declines(x, m.A) for m in members]):
        return torch_backend.backward(x, members, needs_x, given)
    As, Bs, bits = [m.A for m in members], [m.B for m in members], [m.bits for m in members]
    like, wants = members[0].dy, [(m.bits is not None, m.needs_a, _both(m)) for m in members]
    grads = grads_of(members, needs_x, given)
    how = fp8_triton.backward_order(members, needs_x, given, how)
    facts = _facts("backward", how, like, (needs_x, grads, *wants), As, Bs)
    way: _Way = tuned.decided(like, facts, _backward_way, x, members, needs_x, how, grads)
    copies = fp8_triton.rooms(members) if way.order == fp8_copies.ORDER else None
    if given is None:
        ds, dbs = over_dy(members, way.each, copies)
    else:
        # torch's operations make a wider dS for wider adapters on a CPU
        ds, dbs = [d.to(x.dtype) for d in given], [None] * len(members)
    if copies is not None:
        total, own = fp8_triton.grads(x, members, copies, ds)
        return total, list(zip(own, dbs, strict=True))
    das: list[Tensor | None] = [None] * len(members)
    dx = None
    wanted = [i for i, m in enumerate(members) if m.needs_a]
    if way.order == "joined" and needs_x and len(wanted) == len(members):
        dtypes = [a.dtype for a in As]
        dx, found = grad_xa(x, ds, As, bits, out_dtypes=dtypes, config=way.first)
        das = list(found)
    elif wanted:
        found = grad_a(
            x, [ds[i] for i in wanted], [bits[i] for i in wanted],
            out_dtypes=[As[i].dtype for i in wanted], config=way.first,
        )  # fmt: skip
        for i, da in zip(wanted, found, strict=True):
            das[i] = da
    if needs_x and way.order == "fused":
        dys, ws = [m.dy for m in members], [dense(m.w).t() for m in members]
        dx = fused_grad_input(dys, ws, ds, As, bits, config=way.last)
    elif needs_x:
        if dx is None:
            dx = low_rank_grad_input(ds, As, bits, config=way.last)
        for m in members:
            base_product(m.dy, m.w.t(), dx)
    return dx, list(zip(das, dbs, strict=True))


def _both(m: ProjectionGrad) -> bool:
    """True when one kernel makes dS and dB."""
    return m.needs_b and m.s is not None


def config_over_dy(m: ProjectionGrad) -> Any:
    """The config of the kernel that makes dS of a projection, and dB with it if it is wanted."""
    N, r = m.B.shape
    op, size = ("grad_sb", (N, 0)) if _both(m) else ("shrink", (0, N))
    return tuned.config(op, m.dy, m.B.dtype, *size, r)


def _backward_way(
    x: Tensor, members: list[ProjectionGrad], needs_x: bool, how: str | None, grads: str
) -> _Way:
    As, bits = [m.A for m in members], [m.bits for m in members]
    K, n = members[0].w.shape[0], sum(m.dy.shape[1] for m in members)
    masked = any(word is not None for word in bits)
    group = _Group(members[0].dy, As[0].dtype, [a.shape[0] for a in As], masked)
    order = group.order(how, n, K, grads)
    if order == fp8_copies.ORDER:  # a table's tiles may be narrower than what shares a scale
        return _Way(order, None, [None] * len(members))
    each = [config_over_dy(m) for m in members]
    wanted = [i for i, m in enumerate(members) if m.needs_a]
    first = last = None
    if order == "joined" and needs_x and len(wanted) == len(members):
        return _Way(order, group.config("grad_xa", 0, K), each)
    if wanted:
        ours = group._replace(
            ranks=[group.ranks[i] for i in wanted],
            masked=any(bits[i] is not None for i in wanted),
        )
        first = ours.config("grad_a", 0, K)
    if needs_x and order == "fused":
        last = group.config("gemm_grad_input", n, K)
    elif needs_x:
        last = group.config("low_rank_grad_input", 0, K)
    return _Way(order, first, each, last=last)


def grads_of(
    members: list[ProjectionGrad], needs_x: bool, given: list[Tensor] | None = None
) -> str:
    """The gradients that a backward makes, as letters of "xab", as in the keys of tables.

    With ``given`` dS it makes no dB, and "s" is added.
    """
    needs_b = given is None and any(m.needs_b for m in members)
    return (
        ("x" if needs_x else "")
        + ("a" if any(m.needs_a for m in members) else "")
        + ("b" if needs_b else "")
        + ("s" if given is not None else "")
    )


def over_dy(
    members: list[ProjectionGrad], configs: list[Any], copies: list[Any] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(dS_i, dB_i if wanted or None) of every projection, which need only dY_i.

    ``copies`` have room for each dY_i in fp8.
    """
    copies = copies or [None] * len(members)
    ds: list[Any] = [None] * len(members)
    dbs: list[Tensor | None] = [None] * len(members)
    both = [i for i, m in enumerate(members) if _both(m)]
    for i, m in enumerate(members):
        if i not in both:
            factor = m.scale / (1.0 - m.p)
            ds[i] = shrink(m.dy, [m.B.t()], factor, copy=copies[i], config=configs[i])
    done = grad_sb_group(
        [(m.dy, m.B, m.s, m.scale / (1.0 - m.p)) for m in (members[i] for i in both)],
        [members[i].B.dtype for i in both],
        [configs[i] for i in both],
        [copies[i] for i in both],
    )
    for i, (d, db) in zip(both, done, strict=True):
        ds[i], dbs[i] = d, db
    return ds, dbs


def infer(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    transposed: bool,
    how: str | None = None,
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` is [K, N] when ``transposed``.

    ``how`` is one of ``INFER``. By default it is "decode" for as many rows as that takes, unless a
    table has a faster way.
    """
    return infer_group(x, [Projection(w, bias, A, B, scale, 0.0, transposed)], how)[0]


@on_its_device
def infer_group(x: Tensor, members: list[Projection], how: str | None = None) -> list[Tensor]:
    """Y_i [..., N_i] of projections of x [..., K]; their dropout is left out, ``how`` as before."""
    if any(_declines(x, m.A) for m in members):
        return torch_backend.infer_group(x, members)
    if how in (None, INFER[0]):
        done = quantised_triton.infer(x, members)
        if done is not None:
            return done
    x2, low, count = x.reshape(-1, x.shape[-1]), members[0].A.dtype, len(members)
    (M, K), N, r = x2.shape, sum(m.B.shape[0] for m in members), max(m.A.shape[0] for m in members)
    few = M <= MAX_ROWS
    if fp8_copies.order([m.weight for m in members]) is not None:
        few = False  # those kernels would multiply with W dequantised
    if few and how is None:
        key = tuned.key_of("infer", x2.dtype, low, M, N, K, r, count)
        how = tuned.best_of(INFER, key, x2) or INFER[0]
    if few and how == "decode":
        config = tuned.config("decode", x2, low, N, K, r, count)
        ys = decode_group(
            x2, [dense(m.w).t() for m in members], [m.A for m in members], [m.B for m in members],
            [m.scale for m in members], [m.bias for m in members], config=config,
        )  # fmt: skip
    else:
        undropped = [m._replace(p=0.0) for m in members]
        ys = [y for y, _, _ in forward(x2, undropped, how=how if how in PRODUCTS else None)]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def why_not_mixed(x: Tensor, adapters: Any) -> str | None:
    """The reason that :func:`mixed` runs such a batch on torch; None when the kernel takes it."""
    if len(adapters) > MAX_ADAPTERS:
        return f"{len(adapters)} adapters in one batch are more than {MAX_ADAPTERS}"
    weights = [t for a in adapters if a is not None for t in (a.A, a.B.t())]
    return next((r for t in weights if (r := why_not(x, t)) is not None), None)


@on_its_device
def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any) -> Tensor:
    """Y [M, N] for x [M, K], w [N, K] and an adapter for each sample; see :mod:`.lora_mixed`.

    It is two launches, without gradients.
    """
    reason = why_not_mixed(x, adapters)
    if reason is not None:
        note_once(_TO_TORCH, f"a mixed batch: {reason}")
        return torch_backend.mixed(x, w, bias, adapters, samples)
    As = [None if a is None else a.A for a in adapters]
    Bs = [None if a is None else a.B for a in adapters]
    scales = [0.0 if a is None else a.scale for a in adapters]
    weights = [a for a in As if a is not None]
    config = None
    if weights:
        r, count = max(a.shape[0] for a in weights), next_pow2(len(weights))
        config = tuned.config("mixed_rows", x, weights[0].dtype, w.shape[0], x.shape[1], r, count)
    y: Tensor = _mixed(x, dense(w), As, Bs, scales, samples.on(x.device), bias, config=config)
    return y
