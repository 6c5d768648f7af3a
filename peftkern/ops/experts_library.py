"""A mixture for ``torch.compile`` and export: operators for its linears, the rest as it is traced.

    peftkern::experts_linear            sorted rows of up's or of down's output, and S
    peftkern::experts_linear_backward   the gradients

The gate, known or not, the norm and the sum over a token's experts stand between the operators, so
that the compiler fuses them. Masks are made from a seed, as in :mod:`.library`; the operators sort
the pairs by themselves, and the backward makes masks and order again.

``tensors`` are x, the weight, the bias if there is one, and A and B of each adapter; ``settings``
are 1 with a bias or 0, and scale and p of each adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .apart import apart
from .experts import alone
from .experts.double import plain_rows
from .experts.dropout import adapter_of_rows, words_of_seed
from .experts.loop_linear import low_rank
from .experts.order import sort_pairs
from .experts.parts import Call, ExpertLinear, Factors, Gate
from .experts.ways import of_torch

_library = torch.library.Library("peftkern", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "experts_linear(Tensor[] tensors, Tensor chosen, Tensor? choice, Tensor? seed, "
    "float[] settings, bool gather, bool sentinels) -> (Tensor y, Tensor s)",
    tags=_TAGS,
)
_library.define(
    "experts_linear_backward(Tensor dy, Tensor[] tensors, Tensor chosen, Tensor? choice, "
    "Tensor? seed, Tensor? s, float[] settings, bool gather, bool sentinels, bool[] needs) "
    "-> Tensor[]",
    tags=_TAGS,
)
_ops = torch.ops.peftkern


def _call_of(
    tensors: Sequence[Tensor],
    chosen: Tensor,
    choice: Tensor | None,
    settings: Sequence[float],
    sentinels: bool,
) -> Call:
    """A call whose two linears are the one of an operator."""
    x, weight, *rest = tensors
    bias = rest.pop(0) if settings[0] else None
    pairs = zip(rest[0::2], rest[1::2], settings[1::2], settings[2::2], strict=True)
    part = ExpertLinear(weight, bias, tuple(Factors(*own) for own in pairs))
    return Call(x, chosen, chosen, part, part, Gate(torch.sigmoid), None, choice, sentinels)


def _linear(
    tensors: Sequence[Tensor],
    chosen: Tensor,
    choice: Tensor | None,
    seed: Tensor | None,
    settings: Sequence[float],
    gather: bool,
    sentinels: bool,
) -> tuple[Tensor, Tensor]:
    """(Y [T·k, N], S [T·k, columns])."""
    call = _call_of(tensors, chosen, choice, settings, sentinels)
    order = of_torch(call).way.ordered(call)
    adapter = adapter_of_rows(call, order.pairs)
    words = words_of_seed(call.up, len(order.pairs), adapter, seed)
    y, s = alone.forward(call, order, words, gather)
    low, _ = low_rank(call.up, call.x, choice is not None)
    return y.contiguous(), alone.widened(s, y, alone.columns_of_s(call), low)


def _linear_fake(
    tensors: Sequence[Tensor],
    chosen: Tensor,
    choice: Tensor | None,
    seed: Tensor | None,
    settings: Sequence[float],
    gather: bool,
    sentinels: bool,
) -> tuple[Tensor, Tensor]:
    call = _call_of(tensors, chosen, choice, settings, sentinels)
    low, _ = low_rank(call.up, call.x, choice is not None)
    rows = chosen.shape[0] * chosen.shape[1]
    of_s = (rows if call.up.factors else 0, alone.columns_of_s(call))
    y = call.x.new_empty((rows, call.up.weight.shape[1]))
    return y, call.x.new_empty(of_s, dtype=low)


def _linear_backward(
    dy: Tensor,
    tensors: Sequence[Tensor],
    chosen: Tensor,
    choice: Tensor | None,
    seed: Tensor | None,
    s: Tensor | None,
    settings: Sequence[float],
    gather: bool,
    sentinels: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradient of each of ``tensors``; empty where it is not wanted."""
    call = _call_of(tensors, chosen, choice, settings, sentinels)
    order = of_torch(call).way.ordered(call)
    words = words_of_seed(call.up, len(order.pairs), adapter_of_rows(call, order.pairs), seed)
    of_bias, of_factors = bool(settings[0]) and needs[2], needs[2 + bool(settings[0]) :]
    wanted = list(zip(of_factors[0::2], of_factors[1::2], strict=True))
    dx, grads = alone.backward(
        call, order, words, gather, s, dy.contiguous(), wanted, of_bias, needs[0]
    )
    found = [dx, None, *([grads.bias] if settings[0] else [])]
    found += [t for pair in grads.factors for t in pair]
    return [
        t.new_empty(0) if grad is None else grad.contiguous()
        for t, grad in zip(tensors, found, strict=True)
    ]


def _linear_backward_fake(dy: Tensor, tensors: Sequence[Tensor], *args: Any) -> list[Tensor]:
    *_, needs = args
    return [
        t.new_empty(t.shape) if need else t.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, chosen, choice, seed, ctx.settings, ctx.gather, ctx.sentinels = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    wants_b = any(t.requires_grad for t in tensors[3 + bool(ctx.settings[0]) :: 2])
    ctx.save_for_backward(chosen, choice, seed, output[1] if wants_b else None, *tensors)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    chosen, choice, seed, s, *tensors = ctx.saved_tensors
    needs, none = list(ctx.needs_input_grad[0]), (None,) * 6
    if dy is None or not any(needs):
        return ([None] * len(tensors), *none)
    if torch.is_grad_enabled():  # create_graph=True
        return (_second(ctx, dy, needs), *none)
    found = _ops.experts_linear_backward(
        dy, tensors, chosen, choice, seed, s, ctx.settings, ctx.gather, ctx.sentinels, needs
    )
    return ([grad if need else None for grad, need in zip(found, needs, strict=True)], *none)


def _second(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """The gradients by autograd of the formula, as a graph."""
    chosen, choice, seed, _, *tensors = ctx.saved_tensors
    tensors = apart(tensors)
    call = _call_of(tensors, chosen, choice, ctx.settings, ctx.sentinels)
    pairs, _ = sort_pairs(chosen, call.experts, choice, call.adapters)
    words = words_of_seed(call.up, len(pairs), adapter_of_rows(call, pairs), seed)
    y = plain_rows(call, pairs, words, ctx.gather)
    wanted = [i for i, need in enumerate(needs) if need]
    grads = torch.autograd.grad(
        y, [tensors[i] for i in wanted], dy, create_graph=True, allow_unused=True
    )
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(len(tensors))]


for _name, _real, _fake in (
    ("experts_linear", _linear, _linear_fake),
    ("experts_linear_backward", _linear_backward, _linear_backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "peftkern::experts_linear", _backward, setup_context=_setup_context, lib=_library
)


def _traced_linear(x: Tensor, call: Call, part: ExpertLinear, gather: bool) -> Tensor:
    factors = part.factors
    tensors = [x, part.weight, *([part.bias] if part.bias is not None else [])]
    tensors += [t for f in factors for t in (f.A, f.B)]
    settings = [float(part.bias is not None), *(v for f in factors for v in (f.scale, f.p))]
    drops = any(f.p > 0.0 for f in factors)
    seed = torch.randint(2**62, (1,), device=x.device) if drops else None
    y, _ = _ops.experts_linear(
        tensors, call.chosen, call.choice, seed, settings, gather, call.sentinels
    )
    return y  # type: ignore[no-any-return]


def traced_experts(call: Call) -> Tensor:
    """The mixture's output [T, N], with the same result and errors as the eager operation's."""
    T, k = call.chosen.shape
    h = call.gate.function(_traced_linear(call.x, call, call.up, True))
    y = _traced_linear(h, call, call.down, False)
    if call.norm is not None:
        y = call.norm(y)
    pairs, _ = sort_pairs(call.chosen, call.experts, call.choice, call.adapters)
    place = torch.empty_like(pairs).index_copy(0, pairs, torch.arange(T * k, device=pairs.device))
    y = y.index_select(0, place).view(T, k, -1)
    weighted = y * call.weights[:, :, None]
    if call.sentinels:
        weighted = torch.where(call.chosen[:, :, None] < call.experts, weighted, 0.0)
    return weighted.sum(1).to(call.x.dtype)
