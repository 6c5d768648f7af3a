"""An MLP's middle on the Triton kernels; signatures as in :mod:`.mlp_torch`.

Down's base product is the vendor's, onto which the low-rank part is written before. Calls that the
kernels do not take go to :mod:`.mlp_torch`, with the reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.expand import expand, low_rank_grad_input
from ..kernels.mlp import fits
from . import fp8_copies, fp8_triton, masks, mlp_torch, mlp_triton, triton_backend, tuned
from .device import on_its_device
from .mlp_parts import NONE, Grads, Lows, Member, Shrink, ShrinkGrad, lows_of
from .notes import note_once
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .quantised_triton import base_linear, base_product


def _taken(gate: Tensor, act: str, adapters: list[Tensor]) -> bool:
    reason = mlp_triton.why_not(gate, act, adapters)
    if reason is not None:
        note_once("the Triton backend hands an MLP to torch: %s", reason)
    return reason is None


def _completed(gate: Tensor, up: Tensor | None, inner: Lows) -> tuple[Tensor, Tensor | None]:
    """G and U with the low-rank parts that they are without, in passes of their own."""
    first, second = inner
    if first is not None:
        gate = expand(*first, add=gate)
    return gate, up if second is None else expand(*second, add=up)


@on_its_device
def forward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: Projection | Plain,
    words: list[Tensor | None] | None = None,
    *,
    inner: Lows = NONE,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y [M, N], S [M, r], packed mask) of down; ``words`` has its mask if it is drawn already.

    ``inner``: what G and U are without.
    """
    if not _taken(gate, act, [down.A] if isinstance(down, Projection) else []):
        return mlp_torch.forward(gate, up, act, down, words, inner)
    if isinstance(down, Plain) or fp8_copies.order([down.weight]) != fp8_copies.ORDER:
        gate, up, inner = *_completed(gate, up, inner), NONE
    if isinstance(down, Plain):
        if fp8_copies.order([down.weight]) == fp8_copies.ORDER:
            copy, _ = mlp_triton.activate_fp8(gate, up, act, None)
            return fp8_triton.plain(copy, down, gate.dtype), None, None
        h, _ = mlp_triton.activate(gate, up, act, None)
        return base_linear(h, down.w, down.bias), None, None
    if fp8_copies.order([down.weight]) == fp8_copies.ORDER:
        low, bits, copy = _in_fp8(gate, up, act, down, words, inner)
        return fp8_triton.product(copy, down, low), low, bits
    [bits] = masks.words_of(gate, [down.p]) if words is None else words
    shrink = Shrink(down.A, down.scale / (1.0 - down.p), bits)
    h, s = mlp_triton.activate(gate, up, act, shrink)
    assert s is not None
    N, r = down.B.shape
    config = tuned.config("expand", gate, down.A.dtype, N, 0, r)
    y: Tensor = base_product(h, down.w, expand(s, down.B, down.bias, config=config))
    return y, s, bits


def _in_fp8(
    gate: Tensor,
    up: Any,
    act: str,
    down: Projection,
    words: list[Tensor | None] | None,
    inner: Lows,
) -> tuple[Tensor, Tensor | None, Any]:
    """(S [M, r] of down, its mask, H in fp8); the pass that makes them draws the mask if it can."""
    draw = None
    if words is None:
        found = [] if up is None else [up]
        facts = ("mlp", act, *(t.dtype for t in (gate, *found, down.A)), down.A.shape)
        facts += tuple(None if low is None else (low[1].dtype, low[1].shape) for low in inner)
        words, draw = masks.to_draw(gate, [down.p], fits(down.A.shape[0]), facts)
    [bits] = words
    shrink = Shrink(down.A, down.scale / (1.0 - down.p), bits, draw)
    copy, low = mlp_triton.activate_fp8(gate, up, act, shrink, inner)
    assert low is not None
    return low, bits, copy


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
    ranks = [m.B.shape[1] for m in members if m is not None]
    ranks += [down.A.shape[0]] if isinstance(down, ProjectionGrad) else []
    adds = copied and bool(ranks) and mlp_triton.adds(gate, ranks)
    if not adds:
        gate, up = _completed(gate, up, lows_of(members))
        first, second = [None if m is None else m._replace(apart=False) for m in members]
        members = first, second
    if isinstance(down, PlainGrad):
        dh = base_product(down.dy, down.w.t())
        return mlp_triton.activate_grad(dh, gate, up, act, None, members, copied), None
    if fp8_copies.order([down.w]) == fp8_copies.ORDER:
        copies = fp8_triton.rooms([down])
        [ds], [db] = triton_backend.over_dy([down], [None], copies)
        if adds and down.needs_a:
            dh = fp8_triton.grad_input([down], copies, ds.dtype)
            inside = ShrinkGrad(ds, down.bits, down.A.dtype)
            return mlp_triton.activate_grad(dh, gate, up, act, inside, members, copied, down.A), db
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
