"""An MLP's middle on the Triton kernels; signatures as in :mod:`.mlp_torch`.

Down's base product is the vendor's, onto which the low-rank part is written before. Calls that the
kernels do not take go to :mod:`.mlp_torch`, with the reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.expand import expand, low_rank_grad_input
from . import fp8_copies, fp8_triton, masks, mlp_torch, mlp_triton, triton_backend, tuned
from .device import on_its_device
from .mlp_parts import Grads, Member, Shrink, ShrinkGrad
from .notes import note_once
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .quantised_triton import base_linear, base_product


def _taken(gate: Tensor, act: str, adapters: list[Tensor]) -> bool:
    reason = mlp_triton.why_not(gate, act, adapters)
    if reason is not None:
        note_once("the Triton backend hands an MLP to torch: %s", reason)
    return reason is None


@on_its_device
def forward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: Projection | Plain,
    words: list[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y [M, N], S [M, r], packed mask) of down; ``words`` has its mask if it is drawn already."""
    if not _taken(gate, act, [down.A] if isinstance(down, Projection) else []):
        return mlp_torch.forward(gate, up, act, down, words)
    if isinstance(down, Plain):
        h, _ = mlp_triton.activate(gate, up, act, None)
        return base_linear(h, down.w, down.bias), None, None
    [bits] = masks.words_of(gate, [down.p]) if words is None else words
    shrink = Shrink(down.A, down.scale / (1.0 - down.p), bits)
    if fp8_copies.order([down.weight]) == fp8_copies.ORDER:
        copy, low = mlp_triton.activate_fp8(gate, up, act, shrink)
        return fp8_triton.product(copy, down, low), low, bits
    h, s = mlp_triton.activate(gate, up, act, shrink)
    assert s is not None
    N, r = down.B.shape
    config = tuned.config("expand", gate, down.A.dtype, N, 0, r)
    y: Tensor = base_product(h, down.w, expand(s, down.B, down.bias, config=config))
    return y, s, bits


@on_its_device
def backward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ProjectionGrad | PlainGrad,
    members: tuple[Member | None, Member | None],
    copied: bool = False,
) -> tuple[Grads, Tensor | None]:
    """(gradients of G, U and the adapters' parts that need them; dB [N, r] of down).

    ``copied``: of dG and dU only what they are in fp8 is used.
    """
    behind = [m.B.t() for m in members if m is not None]
    if isinstance(down, ProjectionGrad):
        behind.append(down.A)
    if not _taken(gate, act, behind):
        return mlp_torch.backward(gate, up, act, down, members)
    if isinstance(down, PlainGrad):
        dh = base_product(down.dy, down.w.t())
        return mlp_triton.activate_grad(dh, gate, up, act, None, members, copied), None
    if fp8_copies.order([down.w]) == fp8_copies.ORDER:
        copies = fp8_triton.rooms([down])
        [ds], [db] = triton_backend.over_dy([down], [None], copies)
        dh = fp8_triton.grad_x([down], copies, [ds])
    else:
        [ds], [db] = triton_backend.over_dy([down], [triton_backend.config_over_dy(down)])
        masked, r = down.bits is not None, down.A.shape[0]
        config: Any = tuned.config(
            "low_rank_grad_input", down.dy, down.A.dtype, 0, gate.shape[1], r, 1, masked
        )
        dh = low_rank_grad_input([ds], [down.A], [down.bits], config=config)
        base_product(down.dy, down.w.t(), dh)
    inner = ShrinkGrad(ds, down.bits, down.A.dtype) if down.needs_a else None
    return mlp_triton.activate_grad(dh, gate, up, act, inner, members, copied), db
