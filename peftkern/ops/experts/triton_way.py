"""A mixture on the Triton kernels for sorted rows; what each computes is in :mod:`.loop`.

Tokens are gathered in the kernels' loads and results are scattered in their stores, so that no
sorted copy of X, Y or their gradients is made. :func:`why_not` names the calls that the kernels do
not take; who calls the other functions asks it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.experts_combine import combine
from ...kernels.experts_decode import MAX_PAIRS, FewLinear, decode
from ...kernels.experts_gate import gate as gate_kernel
from ...kernels.experts_gate_grad import PART_RANK, gate_grad
from ...kernels.experts_gemm import gemm
from ...kernels.experts_grad import ONE_PASS_RANK, grad_a, grad_sb
from ...kernels.experts_route import Route, route, rows_of_tile
from ...kernels.experts_shrink import shrink
from ...kernels.mixed import MAX_ADAPTERS
from ..device import capturing, elsewhere
from ..triton_backend import refusal
from .gates import gate_grad as gate_grad_by_torch
from .gates import hidden_again
from .grouped import check_choices, check_experts, check_later
from .order import Order
from .parts import Call, ExpertLinear, Gate, Grads, Kept, LinearGrads, Wants
from .ways import Words

# From so many rows an expert on, B is copied for kernels whose tiles of rows each load it, as its
# numbers are E apart in PEFT's layout. A copy is one such pass over B, and as many bytes again.
COPIED_FROM = 16


def why_not(call: Call, keep: bool) -> str | None:
    """The reason that the kernels do not take a call; None when they do.

    ``keep``: a backward follows.
    """
    if elsewhere(call.x):
        return "the tensors are on another device than the current one"
    factors = [f for part in (call.up, call.down) for f in part.factors if f.A.shape[0]]
    facts = [(f.A.dtype, f.rank(call.experts)) for f in factors] or [(call.x.dtype, 1)]
    for dtype, r in facts:
        if (reason := refusal(call.x, dtype, r)) is not None:
            return reason
    if call.norm is not None:
        return "a norm follows each expert"
    if call.choice is None:
        if any(len(part.factors) > 1 for part in (call.up, call.down)):
            return "several adapters are added to one linear"
    elif keep:
        return "gradients are wanted for a batch of several adapters"
    elif any(f.p for f in factors):
        return "a batch of several adapters has dropout"
    elif call.adapters >= MAX_ADAPTERS:
        return f"{call.adapters} adapters are in a batch, and {MAX_ADAPTERS - 1} are the most"
    if keep and any(p.bias is not None and p.bias.requires_grad for p in (call.up, call.down)):
        return "a bias trains"
    return None


class _Low(NamedTuple):
    """The adapters of one linear as the kernels take them, one for each of the route's."""

    A: Sequence[Tensor | None]  # [E, r, K]
    B: Sequence[Tensor | None]  # [E, N, r]
    scales: Sequence[float]  # with 1 / (1 - p) in them


def _low(part: ExpertLinear, call: Call, tiles_load_b: bool = True) -> _Low | None:
    """None without an adapter that has weights."""
    width = 1 if call.choice is None else call.adapters + 1
    A, B, scales = [], [], []
    for i in range(width):  # tokens without an adapter name the last
        f = part.factors[i] if i < len(part.factors) else None
        a = b = None
        if f is not None and f.A.shape[0]:
            a, b = f.of_experts(call.experts)
            if tiles_load_b and call.chosen.numel() >= COPIED_FROM * call.experts:
                b = b.contiguous()
        A.append(a)
        B.append(b)
        scales.append(1.0 if f is None else f.scale / (1.0 - f.p))
    return _Low(A, B, scales) if any(a is not None for a in A) else None


def _one(low: _Low | None) -> tuple[Tensor | None, Tensor | None, float]:
    """A, B and the scale of the only adapter."""
    return (None, None, 1.0) if low is None else (low.A[0], low.B[0], low.scales[0])


def ordered(call: Call) -> Order:
    """The call's pairs in order; an index or a choice out of range stops the device later."""
    choice, n = call.choice, call.adapters
    if choice is not None:
        choice = torch.where(choice >= 0, choice, n)
    width = 1 if choice is None else n + 1
    block_m = rows_of_tile(call.chosen.numel(), call.experts * width)
    found = route(call.chosen, call.experts, block_m, choice, width)
    check_later(call, found.offsets)
    return Order(found.pairs, found.offsets, own=found)


def _route(order: Order) -> Route:
    assert isinstance(order.own, Route)
    return order.own


def _weights(call: Call) -> Tensor:
    w = call.weights
    return w if w.dtype in (torch.float32, call.x.dtype) else w.float()


def _bits(words: Tensor | None) -> Tensor | None:
    return None if words is None else words[0]


def _known(gate: Gate) -> bool:
    return gate.name is not None or gate.clamp is not None


def _hidden(
    call: Call, rows: Route, gu: Tensor, low: _Low | None, bits: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """H [P, I], and S of down's adapter."""
    gate = call.gate
    if _known(gate):
        A, scales = (None, 1.0) if low is None else (low.A, low.scales)
        found: tuple[Tensor, Tensor | None] = gate_kernel(
            gu, rows, gate.name or "silu", gate.layout, A, scales, bits, clamp=gate.clamp
        )
        return found
    h = gate.function(gu)
    if low is None:
        return h, None
    return h, shrink(h, rows, low.A, low.scales, gather=False, bits=bits)


def forward(call: Call, order: Order, words: Words, keep: bool) -> tuple[Tensor, Kept]:
    """(the mixture's output [T, N], what the backward needs if ``keep``)."""
    rows, x = _route(order), call.x
    up, down = _low(call.up, call), _low(call.down, call)
    s_up = None
    if up is not None:
        s_up = shrink(x, rows, up.A, up.scales, gather=True, bits=_bits(words[0]))
    B = None if up is None else up.B
    gu = gemm(x, rows, call.up.weight, s_up, B, gather=True, scatter=False, bias=call.up.bias)
    h, s_down = _hidden(call, rows, gu, down, _bits(words[1]))
    B = None if down is None else down.B
    y = gemm(h, rows, call.down.weight, s_down, B, gather=False, scatter=True, bias=call.down.bias)
    out: Tensor = combine(y, call.weights)
    return out, Kept(order, gu, s_up, s_down, None)


def _few_linear(part: ExpertLinear, low: _Low | None) -> FewLinear:
    if low is None:
        return FewLinear(part.weight, part.bias)
    return FewLinear(part.weight, part.bias, low.A, low.B, low.scales)


def few(call: Call) -> Tensor | None:
    """The output for few pairs, of which nothing is kept; None where they must be sorted."""
    drops = any(f.p for part in (call.up, call.down) for f in part.factors)
    if call.chosen.numel() > MAX_PAIRS or drops or not _known(call.gate):
        return None
    if not capturing(call.x):  # in a graph it would take as many launches as the output
        check_choices(call)
        here = (
            call.chosen >= 0
            if call.sentinels
            else call.chosen.clamp(0, call.experts - 1) == call.chosen
        )
        check_experts(call, here.all())
    up, down = (_few_linear(part, _low(part, call)) for part in (call.up, call.down))
    gate = call.gate
    y: Tensor = decode(
        call.x, call.chosen, _weights(call), up, down, gate.name or "silu", gate.layout,
        choice=call.choice, clamp=gate.clamp,
    )  # fmt: skip
    return y


class _Behind(NamedTuple):
    """What the step over H gives: [P, ...] of sorted rows, dw by pair."""

    dgu: Tensor
    h: Tensor
    dw: Tensor
    ds: Tensor | None
    db: Tensor | None


def _behind_gate(
    call: Call, rows: Route, gu: Tensor, dh0: Tensor, low: _Low | None, s: Tensor | None
) -> _Behind:
    """``s``: that of up's adapter if its dB is wanted."""
    gate, w = call.gate, _weights(call)
    _, B, scale = _one(low)
    if _known(gate):
        return _Behind(
            *gate_grad(
                dh0, gu, rows, gate.name or "silu", gate.layout, w, B, s, scale, clamp=gate.clamp
            )
        )
    again = hidden_again(gate, gu)
    own = w.reshape(-1).index_select(0, rows.pairs)[:, None]
    dw = torch.zeros(rows.P, dtype=torch.float32, device=gu.device)
    dw[rows.pairs.long()] = (dh0 * again.h).sum(1, dtype=torch.float32)
    dgu = gate_grad_by_torch(gate, gu, again, (dh0 * own).to(dh0.dtype))
    ds = db = None
    if B is not None and s is not None:
        ds, db = grad_sb(dgu, rows, B, s, scale, gather=False)
    elif B is not None:
        ds = shrink(dgu, rows, [B.transpose(1, 2)], scale, gather=False)
    return _Behind(dgu, again.h, dw, ds, db)


def _over_dout(
    call: Call, rows: Route, dout: Tensor, s: Tensor | None, low: _Low | None, needs_ds: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dS without the routing weights [P, r], dB [E, N, r]) of down's adapter.

    ``s``: its S if dB is wanted.
    """
    _, B, scale = _one(low)
    if B is None:
        return None, None
    if s is not None:
        found: tuple[Tensor, Tensor] = grad_sb(
            dout, rows, B, s, scale, gather=True, row_weight=_weights(call)
        )
        return found
    if not needs_ds:
        return None, None
    return shrink(dout, rows, [B.transpose(1, 2)], scale, gather=True), None


def _through(
    x: Tensor, rows: Route, part: ExpertLinear, ds: Tensor | None, low: _Low | None,
    bits: Tensor | None, *, gather: bool, scatter: bool,
) -> Tensor:  # fmt: skip
    """dY W_e + mask ∘ (dS A_e), for dY in ``x``."""
    A, _, _ = _one(low)
    At = None if A is None else [A.transpose(1, 2)]
    W = part.weight.transpose(1, 2)
    dx: Tensor = gemm(x, rows, W, ds, At, gather=gather, scatter=scatter, bits=bits)
    return dx


def backward(call: Call, kept: Kept, words: Words, dout: Tensor, wants: Wants) -> Grads:
    """The gradients that are wanted, for ``dout`` [T, N]."""
    rows, x, gu = _route(kept.order), call.x, kept.gu
    bits_up, bits_down = _bits(words[0]), _bits(words[1])
    (a_up, b_up), (a_down, b_down) = _first(wants.up), _first(wants.down)
    # up to these ranks the kernels that make dB load each number of B once
    up = _low(call.up, call, not (b_up and _rank(call.up, call) <= PART_RANK))
    down = _low(call.down, call, not (b_down and _rank(call.down, call) <= ONE_PASS_RANK))
    through = wants.behind_gate or wants.weights
    s = kept.s_down if b_down else None
    ds0, db_down = _over_dout(call, rows, dout, s, down, a_down or through)
    dx = dw = h = da_up = db_up = da_down = None
    if through:
        assert gu is not None
        dh0 = _through(dout, rows, call.down, ds0, down, bits_down, gather=True, scatter=False)
        behind = _behind_gate(call, rows, gu, dh0, up, kept.s_up if b_up else None)
        del dh0
        h, db_up = behind.h, behind.db
        if a_up and behind.ds is not None:
            da_up = grad_a(behind.ds, x, rows, gather=True, bits=bits_up)
        if wants.x:
            ds = behind.ds
            pairs = _through(behind.dgu, rows, call.up, ds, up, bits_up, gather=False, scatter=True)
            dx = combine(pairs, None, k=rows.k)
        if wants.weights:
            dw = _grad_weights(call, behind.dw, dout)
    if a_down and ds0 is not None:
        if h is None:
            assert gu is not None
            h, _ = _hidden(call, rows, gu, None, None)
        w = _weights(call)
        da_down = grad_a(ds0, h, rows, gather=False, row_weight=w, bits=bits_down)
    of_up = _linear_grads(call.up, da_up, db_up)
    return Grads(dx, dw, of_up, _linear_grads(call.down, da_down, db_down))


def _rank(part: ExpertLinear, call: Call) -> int:
    return max((f.rank(call.experts) for f in part.factors), default=0)


def _first(wanted: Sequence[tuple[bool, bool]]) -> tuple[bool, bool]:
    return wanted[0] if wanted else (False, False)


def _linear_grads(part: ExpertLinear, dA: Tensor | None, dB: Tensor | None) -> LinearGrads:
    """``dA`` [E, r, K] and ``dB`` [E, N, r] in PEFT's layout."""
    if not part.factors:
        return LinearGrads(None, [])
    f = part.factors[0]
    a = None if dA is None else dA.flatten(0, 1).to(f.A.dtype)
    b = None
    if dB is not None:
        b = dB.permute(1, 2, 0).to(f.B.dtype, memory_format=torch.contiguous_format)
        b = b.contiguous().view(f.B.shape)
    return LinearGrads(None, [(a, b)])


def _grad_weights(call: Call, dw: Tensor, dout: Tensor) -> Tensor:
    """The routing weights' gradient [T, k]; ``dw`` [P] by pair has all but the bias' share."""
    dw, bias = dw.view(call.weights.shape), call.down.bias
    if bias is not None:
        index = call.chosen.long()
        share = torch.mm(dout, bias.t()).float().gather(1, index.clamp(max=call.experts - 1))
        dw = dw + share.masked_fill_(index >= call.experts, 0.0)
    return dw.to(call.weights.dtype)
