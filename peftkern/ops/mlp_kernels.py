"""An MLP's middle where linears run on Triton kernels; signatures as in :mod:`.mlp_torch`.

Down's base product is the vendor's. Calls whose adapters the kernels do not take go to
:mod:`.mlp_torch`, as the linears do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.expand import expand, low_rank_grad_input
from . import mlp_torch as elementwise
from . import triton_backend, tuned
from .device import on_its_device
from .mlp_parts import Grads, Member, Shrink, ShrinkGrad
from .projection import Plain, PlainGrad, Projection, ProjectionGrad


def _taken(like: Tensor, adapters: list[Tensor]) -> bool:
    return not any(triton_backend._declines(like, A) for A in adapters)


@on_its_device
def forward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: Projection | Plain,
    words: list[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y [M, N], S [M, r], packed mask) of down; ``words`` has its mask if it is drawn already."""
    if isinstance(down, Plain):
        h, _ = elementwise.activate(gate, up, act, None)
        return elementwise.product(h, down), None, None
    if not _taken(gate, [down.A]):
        return elementwise.forward(gate, up, act, down, words)
    [bits] = triton_backend.words_of(gate, [down.p]) if words is None else words
    shrink = Shrink(down.A, down.scale / (1.0 - down.p), bits)
    h, s = elementwise.activate(gate, up, act, shrink)
    assert s is not None
    s = s.to(gate.dtype)
    N, r = down.B.shape
    config = tuned.config("expand", gate, down.A.dtype, N, 0, r)
    y: Tensor = expand(s, down.B, down.bias, config=config).addmm_(h, down.w)
    return y, s, bits


@on_its_device
def backward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ProjectionGrad | PlainGrad,
    members: tuple[Member | None, Member | None],
) -> tuple[Grads, Tensor | None]:
    """(gradients of G, U and the adapters' parts that need them; dB [N, r] of down)."""
    behind = [m.B.t() for m in members if m is not None]
    if isinstance(down, ProjectionGrad):
        behind.append(down.A)
    if not _taken(gate, behind):
        return elementwise.backward(gate, up, act, down, members)
    if isinstance(down, PlainGrad):
        dh = torch.mm(down.dy, down.w.t())
        return elementwise.activate_grad(dh, gate, up, act, None, members), None
    [ds], [db] = triton_backend._over_dy([down])
    masked, r = down.bits is not None, down.A.shape[0]
    config: Any = tuned.config(
        "low_rank_grad_input", down.dy, down.A.dtype, 0, gate.shape[1], r, 1, masked
    )
    dh = low_rank_grad_input([ds], [down.A], [down.bits], config=config)
    dh.addmm_(down.dy, down.w.t())
    inner = ShrinkGrad(ds, down.bits, down.A.dtype) if down.needs_a else None
    return elementwise.activate_grad(dh, gate, up, act, inner, members), db
