"""An MLP's elementwise step and its gradients as float64 torch formulas; shapes as in mlp.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .mlp_arguments import MlpMember


def apply(x: Tensor, act: str) -> Tensor:
    """act(x) by torch's own functions, in x's dtype."""
    if act == "silu":
        return F.silu(x)
    if act in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    y = torch.relu(x)
    return y * y if act == "relu2" else y


def mlp(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    a: Tensor | None = None,
    scale: float = 1.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(H [M, K], S [M, r] or None without ``a``); ``keep`` is the mask, bool [M, K]."""
    h = apply(gate.double(), act)
    h = h if up is None else h * up.double()
    if a is None:
        return h, None
    return h, scale * ((h if keep is None else h * keep) @ a.double().T)


def mlp_grad(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    members: Sequence[MlpMember | None] = (None, None),
    ds: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None], Tensor | None]:
    """([dG, dU], dS of gate and up, dB of gate and up, dA of down); None for those not wanted.

    Without ``up`` the first list is [dG].
    """
    with torch.enable_grad():
        leaves = [t.detach().double().requires_grad_() for t in (gate, up) if t is not None]
        h = apply(leaves[0], act)
        h = h if up is None else h * leaves[1]
        outs = list(torch.autograd.grad(h, leaves, dh.double()))
    low, dbs = list[Tensor | None](), list[Tensor | None]()
    for i, m in enumerate(members):
        low.append(None if m is None else m.scale * (outs[i] @ m.b.double()))
        dbs.append(None if m is None or m.s is None else outs[i].T @ m.s.double())
    kept = h.detach() if keep is None else h.detach() * keep
    return outs, low, dbs, None if ds is None else ds.double().T @ kept
