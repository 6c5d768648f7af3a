"""The formula of a mixture with adapters, expert by expert, for autograd and as a reference."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from .parts import ExpertLinear, Gate


def plain_linear(
    x: Tensor, part: ExpertLinear, e: int, chosen: Tensor | None, keep: list[Tensor | None]
) -> Tensor:
    """x [m, K] through expert e of ``part``; ``keep`` has a 0/1 mask [m, K] for each adapter.

    With ``chosen`` [m], row i gets adapter chosen[i] alone, or none for -1.
    """
    y = linear(x, part.weight[e], None if part.bias is None else part.bias[e])
    for i, (factors, mask) in enumerate(zip(part.factors, keep, strict=True)):
        A, B = (f[e].to(x.dtype) for f in factors.of_experts(part.weight.shape[0]))
        dropped = x if mask is None else x * mask / (1.0 - factors.p)
        update = factors.scale * linear(linear(dropped, A), B)
        if chosen is not None:
            update = update * (chosen == i)[:, None]
        y = y + update
    return y


def plain_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    gate: Gate,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    choice: Tensor | None = None,
    up_masks: list[Tensor | None] | None = None,
    down_masks: list[Tensor | None] | None = None,
) -> Tensor:
    """The mixture's output [T, N]; the arguments are those of :func:`..lora_experts.lora_experts`.

    Masks are [T·k, K], one for each adapter, whose row t·k + j is that of token t's choice j.
    """
    T, k = index.shape
    experts = up.weight.shape[0]
    up_masks = up_masks or [None] * len(up.factors)
    down_masks = down_masks or [None] * len(down.factors)
    out = x.new_zeros((T * k, down.weight.shape[1]))
    flat = index.reshape(-1)
    for e in range(experts):
        pairs = (flat == e).nonzero()[:, 0]
        if not len(pairs):
            continue
        tokens = pairs // k
        chosen = None if choice is None else choice[tokens]
        own = [None if m is None else m[pairs] for m in up_masks]
        h = gate.function(plain_linear(x[tokens], up, e, chosen, own))
        own = [None if m is None else m[pairs] for m in down_masks]
        y = plain_linear(h, down, e, chosen, own)
        if norm is not None:
            y = norm(y)
        out = out.index_put((pairs,), y)
    return (out.view(T, k, -1) * weights.to(out.dtype)[:, :, None]).sum(1)
