"""The tensors of a call as one flat list, as autograd and operators take them, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .parts import Call, ExpertLinear, Factors, LinearGrads, Wants


def tensors_of(call: Call) -> list[Tensor | None]:
    """x, weights, and of up and then down: bias, and A and B of each adapter, weight."""
    found: list[Tensor | None] = [call.x, call.weights]
    for part in (call.up, call.down):
        found += [part.bias, *(t for f in part.factors for t in (f.A, f.B)), part.weight]
    return found


def with_tensors(call: Call, tensors: Any) -> Call:
    """``call`` with the tensors of :func:`tensors_of`."""
    x, weights, *rest = tensors
    parts = []
    for part in (call.up, call.down):
        bias, *pairs = rest[: 1 + 2 * len(part.factors)]
        weight, *rest = rest[1 + 2 * len(part.factors) :]
        factors = tuple(
            Factors(A, B, f.scale, f.p)
            for f, A, B in zip(part.factors, pairs[0::2], pairs[1::2], strict=True)
        )
        parts.append(ExpertLinear(weight, bias, factors))
    return call._replace(x=x, weights=weights, up=parts[0], down=parts[1])


def wants_of(call: Call, needs: Any) -> Wants:
    """``needs`` has a flag for each of :func:`tensors_of`."""
    x, weights, *rest = needs
    found = []
    for part in (call.up, call.down):
        bias, *pairs = rest[: 1 + 2 * len(part.factors)]
        rest = rest[2 + 2 * len(part.factors) :]
        found.append((bias, tuple(zip(pairs[0::2], pairs[1::2], strict=True))))
    (up_bias, up), (down_bias, down) = found
    return Wants(x, weights, up, down, up_bias, down_bias)


def without_tensors(call: Call) -> Call:
    """``call`` for a Function's ctx, which may not hold its inputs but as saved tensors."""
    nothing: Any = None
    bare = with_tensors(call, [None] * len(tensors_of(call)))
    return bare._replace(chosen=nothing, choice=None)


def flat_grads(grads: LinearGrads) -> list[Tensor | None]:
    """The gradients of one linear in the order of :func:`tensors_of`."""
    return [grads.bias, *(t for pair in grads.factors for t in pair), None]
