"""A mixture's numbers in float64 for a few tokens and two experts, whatever its size.

Out, dX and the gradient of the routing weights depend on a token's own experts alone, and the
gradients of an expert's factors on its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixtures import PARAMETERS, Sizes
from .numerics import relative
from .providers import ALPHA

TOKENS, EXPERTS = 4, 2


class Exact:
    """The float64 numbers of experts with ``adapters``, {parameter: (A, B)}, which may be none.

    Args:
        module: transformers' experts, adapted or not.
        x, index, weights: tokens [T, D], their experts [T, k], the routing weights [T, k].
    """

    def __init__(
        self,
        module: Any,
        adapters: dict[str, tuple[Tensor, Tensor]],
        sizes: Sizes,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> None:
        while hasattr(module, "base_layer"):
            module = module.base_layer
        self.own, self.adapters, self.sizes = module, adapters, sizes
        self.x, self.index, self.weights = (t.detach() for t in (x, index, weights))
        step = max(1, x.shape[0] // TOKENS)
        self.tokens = list(range(0, x.shape[0], step))[:TOKENS]

    def _of(self, A: Tensor, B: Tensor, e: int) -> tuple[Tensor, Tensor]:
        """A_e [r, K] and B_e [N, r] of PEFT's tensors, or of their gradients."""
        E = self.sizes.E
        r = A.shape[0] // E
        return A.detach().view(E, r, -1)[e], B.detach().view(B.shape[0], r, E)[..., e]

    def _factors(self, name: str, e: int) -> list[Tensor]:
        """A_e and B_e as leaves in float64; empty without an adapter."""
        if name not in self.adapters:
            return []
        return [t.double().requires_grad_() for t in self._of(*self.adapters[name], e)]

    def _linear(self, x: Tensor, name: str, e: int, low: list[Tensor]) -> Tensor:
        weight = getattr(self.own, name)[e].double()
        y = x @ (weight if self.sizes.gpt_oss else weight.t())
        if self.sizes.gpt_oss:
            y = y + getattr(self.own, f"{name}_bias")[e].double()
        return y + ALPHA * (x @ low[0].t()) @ low[1].t() if low else y

    def _expert(self, x: Tensor, e: int, low: list[list[Tensor]]) -> Tensor:
        h = self.own._apply_gate(self._linear(x, PARAMETERS[0], e, low[0]))
        return self._linear(h, PARAMETERS[1], e, low[1])

    def _of_tokens(self, dout: Tensor | None) -> tuple[Tensor, ...]:
        """(Out, dX, dw) of the chosen tokens; Out alone without ``dout``."""
        x = self.x[self.tokens].double().requires_grad_()
        w = self.weights[self.tokens].double().requires_grad_()
        rows = []
        for i, experts in enumerate(self.index[self.tokens].tolist()):
            made = [
                w[i, j] * self._expert(x[i : i + 1], e, [self._factors(n, e) for n in PARAMETERS])
                for j, e in enumerate(experts)
            ]
            rows.append(torch.cat(made).sum(0))
        y = torch.stack(rows)
        if dout is None:
            return (y.detach(),)
        return y.detach(), *torch.autograd.grad(y, (x, w), dout[self.tokens].double())

    def _of_expert(self, e: int, dout: Tensor) -> list[Tensor]:
        """dA and dB of up and of down, of one expert with all its tokens."""
        token, j = (self.index == e).nonzero(as_tuple=True)
        low = [self._factors(name, e) for name in PARAMETERS]
        y = self._expert(self.x[token].double(), e, low)
        dy = dout[token].double() * self.weights[token, j].double()[:, None]
        return list(torch.autograd.grad(y, [t for pair in low for t in pair], dy))

    def errors(self, y: Tensor, *grads: Tensor, dout: Tensor | None = None) -> dict[str, float]:
        """The largest relative error of each kind: "y", and of ``grads`` "dx", "dw", "da", "db".

        ``grads`` are those of x, the routing weights, and A and B of each adapted parameter.
        """
        want = self._of_tokens(dout)
        names = ("y", "dx", "dw")
        found = {
            name: relative(got[self.tokens], exact)
            for name, got, exact in zip(names, (y, *grads[:2]), want, strict=False)
        }
        if dout is None or not self.adapters:
            return found
        for e in sorted(set(self.index[self.tokens[0]].tolist()))[:EXPERTS]:
            own = [
                t for A, B in zip(grads[2::2], grads[3::2], strict=True) for t in self._of(A, B, e)
            ]
            for i, (got, exact) in enumerate(zip(own, self._of_expert(e, dout), strict=True)):
                name = "db" if i % 2 else "da"
                found[name] = max(found.get(name, 0.0), relative(got, exact))
        return found
