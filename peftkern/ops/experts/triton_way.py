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

from ...kernels.common import arch_of, padded
from ...kernels.experts_combine import combine
from ...kernels.experts_decode import MAX_PAIRS, FewLinear, decode
from ...kernels.experts_gate import gate as gate_kernel
from ...kernels.experts_gate_grad import PART_RANK, fits, gate_grad
from ...kernels.experts_gemm import gemm
from ...kernels.experts_grad import ONE_PASS_RANK, grad_a, grad_sb
from ...kernels.experts_route import Route, route, rows_of_tile
from ...kernels.experts_shrink import shrink
from ...kernels.mixed import MAX_ADAPTERS
from ..bases.experts import BaseExperts
from ..device import capturing, elsewhere
from ..notes import note_once
from ..triton_backend import refusal
from .configs import Configs
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
    if isinstance(call.up.weight, BaseExperts):
        return f"experts in {call.up.weight.packed.format} are dequantised one by one"
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
    gate, inner, configs = call.gate, call.down.weight.shape[2], Configs(call, rows.block_m)
    part = call.down if low is not None else call.down._replace(factors=())
    masked = bits is not None
    if _known(gate):
        A, scales = (None, 1.0) if low is None else (low.A, low.scales)
        found: tuple[Tensor, Tensor | None] = gate_kernel(
            gu, rows, gate.name or "silu", gate.layout, A, scales, bits, clamp=gate.clamp,
            config=configs.of("experts_gate", part, 0, inner, masked=masked),
        )  # fmt: skip
        return found
    h = gate.function(gu)
    if low is None:
        return h, None
    config = configs.of("experts_shrink", part, 0, inner, masked=masked)
    return h, shrink(h, rows, low.A, low.scales, gather=False, bits=bits, config=config)


def forward(call: Call, order: Order, words: Words, keep: bool) -> tuple[Tensor, Kept]:
    """(the mixture's output [T, N], what the backward needs if ``keep``)."""
    rows, x = _route(order), call.x
    up, down = _low(call.up, call), _low(call.down, call)
    (_, N1, K), (_, N, inner) = call.up.weight.shape, call.down.weight.shape
    configs, bits_up = Configs(call, rows.block_m), _bits(words[0])
    s_up = None
    if up is not None:
        masked = bits_up is not None
        config = configs.of("experts_shrink", call.up, 0, K, gather=True, masked=masked)
        s_up = shrink(x, rows, up.A, up.scales, gather=True, bits=bits_up, config=config)
    B = None if up is None else up.B
    gu = gemm(
        x, rows, call.up.weight, s_up, B, gather=True, scatter=False, bias=call.up.bias,
        config=configs.of("experts_gemm", call.up, N1, K, gather=True),
    )  # fmt: skip
    h, s_down = _hidden(call, rows, gu, down, _bits(words[1]))
    B = None if down is None else down.B
    y = gemm(
        h, rows, call.down.weight, s_down, B, gather=False, scatter=True, bias=call.down.bias,
        config=configs.of("experts_gemm", call.down, N, inner),
    )  # fmt: skip
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
    gate, (_, N1, K) = call.gate, call.up.weight.shape
    both = call.up._replace(factors=call.up.factors + call.down.factors)
    y: Tensor = decode(
        call.x, call.chosen, _weights(call), up, down, gate.name or "silu", gate.layout,
        choice=call.choice, clamp=gate.clamp,
        config=Configs(call, 0).of("experts_decode", both, N1, K),
    )  # fmt: skip
    return y


class _Behind(NamedTuple):
    """What the step over H gives: [P, ...] of sorted rows, dw by pair; dA is that of down."""

    dgu: Tensor
    dw: Tensor
    ds: Tensor | None
    db: Tensor | None
    da: Tensor | None


def _behind_gate(
    call: Call, rows: Route, gu: Tensor, dh0: Tensor, low: _Low | None, s: Tensor | None,
    ds_down: Tensor | None, bits: Tensor | None,
) -> _Behind:  # fmt: skip
    """``s``: that of up's adapter if its dB is wanted; ``ds_down``: that of down's if its dA is.

    ``bits``: the keep mask of H.
    """
    gate, w = call.gate, _weights(call)
    _, B, scale = _one(low)
    configs, N1 = Configs(call, rows.block_m), gu.shape[1]
    if ds_down is None:
        bits = None
    if _known(gate):
        config, r = None, 0 if B is None else B.shape[2]
        if ds_down is not None:
            _note_h(gu, r, s is not None, ds_down.shape[1])
        if ds_down is None or (r and padded(ds_down.shape[1]) == padded(r)):  # as it was raced
            config = configs.of(
                "experts_gate_grad", call.up, 0, dh0.shape[1], masked=bits is not None
            )
        return _Behind(
            *gate_grad(
                dh0, gu, rows, gate.name or "silu", gate.layout, w, B, s, scale,
                ds_down=ds_down, bits=bits, clamp=gate.clamp, config=config,
            )
        )  # fmt: skip
    again = hidden_again(gate, gu)
    own = w.reshape(-1).index_select(0, rows.pairs)[:, None]
    dw = torch.zeros(rows.P, dtype=torch.float32, device=gu.device)
    dw[rows.pairs.long()] = (dh0 * again.h).sum(1, dtype=torch.float32)
    dgu = gate_grad_by_torch(gate, gu, again, (dh0 * own).to(dh0.dtype))
    ds = db = None
    if B is not None and s is not None:
        config = configs.of("experts_grad_sb", call.up, N1, 0)
        ds, db = grad_sb(dgu, rows, B, s, scale, gather=False, config=config)
    elif B is not None:
        config = configs.of("experts_shrink", call.up, 0, N1)
        ds = shrink(dgu, rows, [B.transpose(1, 2)], scale, gather=False, config=config)
    da = None
    if ds_down is not None:
        config = configs.of("experts_grad_a", call.down, 0, dh0.shape[1], masked=bits is not None)
        da = grad_a(ds_down, again.h, rows, gather=False, row_weight=w, bits=bits, config=config)
    return _Behind(dgu, dw, ds, db, da)


def _note_h(gu: Tensor, r: int, sums: bool, r_down: int) -> None:
    """Say once that H is written for dA of down, where it is."""
    if not fits(r, sums, r_down, arch_of(gu.device), gu.element_size()):
        words = "a mixture's backward writes H: dA of down has rank %d, too large beside up's %d"
        note_once(words, r_down, r)


def _over_dout(
    call: Call, rows: Route, dout: Tensor, s: Tensor | None, low: _Low | None, needs_ds: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dS without the routing weights [P, r], dB [E, N, r]) of down's adapter.

    ``s``: its S if dB is wanted.
    """
    _, B, scale = _one(low)
    if B is None:
        return None, None
    configs, N = Configs(call, rows.block_m), dout.shape[1]
    if s is not None:
        config = configs.of("experts_grad_sb", call.down, N, 0, gather=True)
        found: tuple[Tensor, Tensor] = grad_sb(
            dout, rows, B, s, scale, gather=True, row_weight=_weights(call), config=config
        )
        return found
    if not needs_ds:
        return None, None
    config = configs.of("experts_shrink", call.down, 0, N, gather=True)
    return shrink(dout, rows, [B.transpose(1, 2)], scale, gather=True, config=config), None


def _through(
    call: Call, x: Tensor, rows: Route, part: ExpertLinear, ds: Tensor | None, low: _Low | None,
    bits: Tensor | None, *, gather: bool, scatter: bool,
) -> Tensor:  # fmt: skip
    """dY W_e + mask ∘ (dS A_e), for dY in ``x``."""
    A, _, _ = _one(low)
    At = None if A is None else [A.transpose(1, 2)]
    W, (_, N, K), masked = part.weight.transpose(1, 2), part.weight.shape, bits is not None
    config = Configs(call, rows.block_m).of(
        "experts_gemm_grad_input", part, N, K, gather=gather, masked=masked
    )
    dx: Tensor = gemm(
        x, rows, W, ds, At, gather=gather, scatter=scatter, bits=bits, config=config
    )  # fmt: skip
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
    configs = Configs(call, rows.block_m)
    s = kept.s_down if b_down else None
    ds0, db_down = _over_dout(call, rows, dout, s, down, a_down or through)
    dx = dw = da_up = db_up = da_down = None
    if through:
        assert gu is not None
        dh0 = _through(
            call, dout, rows, call.down, ds0, down, bits_down, gather=True, scatter=False
        )
        behind = _behind_gate(
            call, rows, gu, dh0, up, kept.s_up if b_up else None,
            ds0 if a_down else None, bits_down,
        )  # fmt: skip
        del dh0
        db_up, da_down = behind.db, behind.da
        if a_up and behind.ds is not None:
            config = configs.of("experts_grad_a", call.up, 0, x.shape[1], gather=True,
                                masked=bits_up is not None)  # fmt: skip
            da_up = grad_a(behind.ds, x, rows, gather=True, bits=bits_up, config=config)
        if wants.x:
            ds = behind.ds
            pairs = _through(
                call, behind.dgu, rows, call.up, ds, up, bits_up, gather=False, scatter=True
            )
            dx = combine(pairs, None, k=rows.k)
        if wants.weights:
            dw = _grad_weights(call, behind.dw, dout)
    elif a_down and ds0 is not None:
        assert gu is not None
        h, _ = _hidden(call, rows, gu, None, None)
        w, masked = _weights(call), bits_down is not None
        config = configs.of("experts_grad_a", call.down, 0, h.shape[1], masked=masked)
        da_down = grad_a(ds0, h, rows, gather=False, row_weight=w, bits=bits_down, config=config)
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
