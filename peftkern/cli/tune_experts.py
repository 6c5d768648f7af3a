"""The mixtures of experts of a model that ``peftkern tune --experts`` races, and a race of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.tuning import Key
from ..ops import tuned
from ..ops.experts.parts import ExpertLinear, Factors, Gate
from .errors import UserError

# what configurations call the number of a token's experts
_TOP = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k",
        "num_experts_per_token")  # fmt: skip


@dataclass(frozen=True)
class MixtureShape:
    """Numbers of a mixture whose experts' linears are [N1, K] and [N, inner]."""

    experts: int
    top: int
    N1: int
    K: int
    N: int
    inner: int
    bias: bool
    transposed: bool
    act: str | None
    layout: str
    clamp: tuple[float, float, float] | None
    gate: Gate = field(compare=False)

    def linears(self, some: Any, r: int, low: torch.dtype, p: float) -> list[ExpertLinear]:
        """The linears with one adapter each; ``some(*shape, dtype=None)`` draws a tensor."""
        made, E = [], self.experts
        for n, k in ((self.N1, self.K), (self.N, self.inner)):
            weight = some(E, k, n).transpose(1, 2) if self.transposed else some(E, n, k)
            A, B = some(r * E, k, dtype=low), some(n, r * E, dtype=low)
            bias = some(E, n) if self.bias else None
            factors = Factors(A.requires_grad_(), B.requires_grad_(), 2.0, p)
            made.append(ExpertLinear(weight, bias, (factors,)))
        return made


def mixtures_of(model: nn.Module, config: Any) -> dict[MixtureShape, None]:
    """The different mixtures of transformers' experts interface in a model on the meta device.

    A norm after each expert keeps a mixture from the kernels, so those that have one are left out.

    Raises:
        UserError: there is none, or the configuration does not tell the experts of a token.
    """
    from ..tuners.lora.experts import form_of, parameters_of
    from ..tuners.lora.experts_gate import gate_of

    found: dict[MixtureShape, None] = {}
    for module in model.modules():
        form = form_of(module.__class__)
        if form is None or getattr(module, "has_post_expert_norm", False):
            continue
        holder: Any = module
        weights = [getattr(holder, name) for name in parameters_of(holder)]
        if holder.is_transposed:
            weights = [w.transpose(1, 2) for w in weights]
        (E, N1, K), (_, N, inner) = (w.shape for w in weights)
        gate = gate_of(holder, form)
        numbers = E, _top(config), N1, K, N, inner, holder.has_bias, holder.is_transposed
        found[MixtureShape(*numbers, gate.name, gate.layout, gate.clamp, gate)] = None
    if not found:
        raise UserError("--experts is given, and no experts of the model run on kernels")
    return found


def _top(config: Any) -> int:
    text = config.get_text_config()
    for name in _TOP:
        if isinstance(top := getattr(text, name, None), int):
            return top
    raise UserError(
        f"--experts is given, and the model's config.json has none of {', '.join(_TOP)}"
    )


def run_mixture(
    shape: MixtureShape, T: int, p: float | None, r: int, dtype: torch.dtype, low: torch.dtype,
    device: torch.device,
) -> tuple[Key, ...]:  # fmt: skip
    """One call for T tokens, and its backward unless ``p`` is None; the keys that it decided.

    Each token has other experts than its neighbours.
    """
    from ..ops.lora_experts import lora_experts

    def some(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=size[-1] ** -0.5)

    book = tuned.book(-1 if device.index is None else device.index)
    before = set(book.decisions)
    up, down = shape.linears(some, r, low, p or 0.0)
    x, weights = some(T, shape.K), some(T, shape.top).softmax(1)
    index = torch.arange(T * shape.top, device=device).view(T, shape.top) % shape.experts
    with torch.set_grad_enabled(p is not None):
        for leaf in (x, weights):
            leaf.requires_grad_(p is not None)
        y = lora_experts(x, index, weights, up, down, shape.gate)
    if p is not None:
        y.backward(some(*y.shape))
    return tuple(key for key in book.decisions if key not in before)
