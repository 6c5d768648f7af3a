"""The dispatcher for an MLP's middle: torch's operations or the kernels, whichever was faster.

Decisions are made as in :mod:`.auto_backend`. Both ways keep the same tensors, so that a decision
which differs between a forward and its recomputation changes nothing that a checkpoint compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels.tuning import Key
from . import auto_backend, choices, mlp_kernels, mlp_torch, sampled_mlp
from .auto_backend import _decide, _foreign, _known
from .device import on_its_device
from .mlp_parts import NONE, Grads, Lows, Member, lows_of
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .tuned import key_of


@on_its_device
def forward(
    gate: Tensor, up: Tensor | None, act: str, down: Projection | Plain, *, inner: Lows = NONE
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y [M, N], S [M, r], packed mask) of down; ``inner``: what G and U are without."""
    if _foreign(gate):
        return mlp_torch.forward(gate, up, act, down, inner=inner)
    adapters = [down.A] if isinstance(down, Projection) else []
    if auto_backend.in_fp8("mlp_forward", gate, [down.w], adapters):
        return mlp_kernels.forward(gate, up, act, down, inner=inner)
    gate, up = mlp_torch.completed(gate, up, inner)
    (K, n), p, adapter = down.w.shape, 0.0, gate.dtype
    r = 0
    if isinstance(down, Projection):
        p, adapter, r = down.p, down.A.dtype, down.A.shape[0]
    what = _words(act, up)
    key = key_of("mlp_forward", gate.dtype, adapter, gate.shape[0], n, K, r, 1, p > 0.0, what)
    decision = _known(key, gate)
    declined = _refused(key, gate) if decision is None else decision.declined
    words: list[Tensor | None] | None = [None]
    if isinstance(down, Projection):
        words = None if declined else choices.words_for(gate, [down])

    def way(name: str) -> Any:
        return _forward(name, gate, up, act, down, words)

    if decision is None:
        exact = sampled_mlp.forward(gate, up, act, down, words or [None])
        decision = _decide(key, gate, _ways(way), exact)
    if declined or decision.declined:
        return mlp_torch.forward(gate, up, act, down, words)
    done: tuple[Tensor, Tensor | None, Tensor | None] = way(decision.how)
    return done


@on_its_device
def backward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ProjectionGrad | PlainGrad,
    members: tuple[Member | None, Member | None],
    copied: bool = False,
) -> tuple[Grads, Tensor | None]:
    """(gradients of G, U and the adapters' parts that need them; dB [N, r] of down)."""
    if _foreign(gate):
        return mlp_torch.backward(gate, up, act, down, members)
    adapters = [down.A] if isinstance(down, ProjectionGrad) else []
    if auto_backend.in_fp8("mlp_backward", gate, [down.w], adapters):
        return mlp_kernels.backward(gate, up, act, down, members, copied)
    gate, up = mlp_torch.completed(gate, up, lows_of(members))
    members = tuple([None if m is None else m._replace(apart=False) for m in members])  # type: ignore[assignment]
    (K, n), adapter, r, mask, what = down.w.shape, gate.dtype, 0, False, _words(act, up)
    if isinstance(down, ProjectionGrad):
        adapter, r, mask = down.A.dtype, down.A.shape[0], down.bits is not None
        what += " a" * down.needs_a + " b" * down.needs_b
    for m in members:
        what += " -" if m is None else f" {m.B.shape[1]}" + "b" * (m.s is not None)
    key = key_of("mlp_backward", gate.dtype, adapter, gate.shape[0], n, K, r, 1, mask, what)

    def way(name: str) -> Any:
        return (mlp_torch if name == choices.TORCH else mlp_kernels).backward(
            gate, up, act, down, members
        )

    decision = _known(key, gate) or _decide(
        key, gate, _ways(way), sampled_mlp.backward(gate, up, act, down, members)
    )
    done: tuple[Grads, Tensor | None] = way(choices.TORCH if decision.declined else decision.how)
    return done


def _words(act: str, up: Tensor | None) -> str:
    return act if up is None else f"{act} gated"


def _ways(way: Callable[[str], Any]) -> Callable[[str], Callable[[], Any]]:
    return lambda name: lambda: way(name)


def _refused(key: Key, like: Tensor) -> bool:
    return auto_backend._declines(key, like) is not None


def _forward(
    how: str, gate: Tensor, up: Tensor | None, act: str, down: Projection | Plain, words: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One way's result, whose S has G's dtype in every way, as each backward may follow."""
    if how != choices.TORCH:
        return mlp_kernels.forward(gate, up, act, down, words)
    y, s, bits = mlp_torch.forward(gate, up, act, down, words)
    return y, s if s is None else s.to(gate.dtype), bits
