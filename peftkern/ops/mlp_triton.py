"""An MLP's elementwise step on the Triton kernels; the signatures are those of :mod:`.mlp_torch`.

H is made with down's S in one pass, and the gradients of both in one. :func:`why_not` names the
calls that the kernels do not take; who calls these functions asks it first. Kernels run with the
configs that a tuning table has for this GPU, or else with their own defaults (:mod:`.tuned`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import fp8_rows
from ..kernels.common import arch_of
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.mlp import mlp
from ..kernels.mlp_arguments import ACTIVATIONS, MlpMember
from ..kernels.mlp_grad import adds as mlp_grad_adds
from ..kernels.mlp_grad import mlp_grad
from . import tuned
from .device import on_its_device
from .mlp_parts import NONE, Grads, Lows, Member, Shrink, ShrinkGrad
from .triton_backend import refusal


def why_not(gate: Tensor, act: str, adapters: list[Tensor]) -> str | None:
    """The reason that the kernels do not take a call; None when they do.

    ``adapters`` are A [r, I] of down and Bᵀ [r, I] of gate and up, those that there are.
    """
    if act not in ACTIVATIONS:
        return f"the activation {act}"
    if not adapters:
        return refusal(gate, gate.dtype, 1)
    return next((r for t in adapters if (r := refusal(gate, t.dtype, t.shape[0]))), None)


@on_its_device
def activate(
    gate: Tensor, up: Tensor | None, act: str, down: Shrink | None
) -> tuple[Tensor, Tensor | None]:
    """(H [M, I], S [M, r] of down's adapter or None)."""
    if down is None:
        h, _ = mlp(gate, up, act, config=_config("mlp", gate, gate.dtype, 0, False))
        assert h is not None
        return h, None
    config = _config("mlp", gate, down.A.dtype, down.A.shape[0], down.bits is not None)
    found: tuple[Tensor, Tensor | None] = mlp(
        gate, up, act, down.A, down.factor, down.bits, config=config
    )
    return found


@on_its_device
def activate_fp8(
    gate: Tensor, up: Tensor | None, act: str, down: Shrink | None, inner: Lows = NONE
) -> tuple[Fp8Rows, Tensor | None]:
    """(H [M, I] in fp8 alone, S [M, r] of down's adapter or None).

    ``inner``: what G and U are without.
    """
    copy = fp8_rows.empty(*gate.shape, gate.device)
    A, factor, bits, draw = (None, 1.0, None, None) if down is None else down
    _, s = mlp(gate, up, act, A, factor, bits, draw=draw, copy=copy, inner=inner)
    return copy, s


@on_its_device
def activate_grad(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ShrinkGrad | None,
    members: tuple[Member | None, Member | None],
    copied: bool = False,
    a: Tensor | None = None,
) -> Grads:
    """The gradients of :func:`activate`, and dS and dB of gate's and up's adapters.

    dG and dU are the halves of one matrix [M, 2 I] where G and U are. ``copied``: they are written
    in fp8, and as numbers only where those are read again. ``a``: A of down, where dH is without
    its low-rank part. That, and what G and U are without, the kernel adds (:func:`adds`).
    """
    found = [m for m in members if m is not None]
    ranks = [m.B.shape[1] for m in found] + ([] if down is None else [down.ds.shape[1]])
    adapter = found[0].B.dtype if found else (gate.dtype if down is None else down.dtype)
    masked = down is not None and down.bits is not None
    rooms: Any = None
    if copied:
        Ks = [gate.shape[1]] * (1 if up is None else 2)
        rooms = (*fp8_rows.side_by_side(gate.shape[0], Ks, gate.device), None)[:2]
    out = mlp_grad(
        dh, gate, up, act,
        [None if m is None else MlpMember(m.B, m.s, m.factor) for m in members],
        None if down is None else down.ds,
        None if down is None else down.bits,
        outs=None if up is None or copied else _halves(gate, up),
        copies=rooms,
        a=a,
        add=any(m.apart for m in found),
        da_dtype=torch.float32 if down is None else down.dtype,
        config=None if copied else _config(
            "mlp_grad", gate, adapter, max(ranks, default=0), masked
        ),
    )  # fmt: skip
    dgate, dup = out.dgate, out.dup
    if dgate is None:
        # a shape without numbers: whoever computes with it gets NaN
        dgate = gate.new_full((1, 1), float("nan")).expand(gate.shape)
        dup = None if up is None else dgate
    low, sums = (out.ds[0], out.ds[1]), (out.db[0], out.db[1])
    return Grads(dgate, dup, out.da, low, sums, rooms or (None, None))


def adds(gate: Tensor, ranks: list[int]) -> bool:
    """True where the kernels' passes add low-rank parts of these ranks to G, U and dH."""
    found: bool = mlp_grad_adds(max(ranks), gate.element_size(), arch_of(gate.device))
    return found


def _config(op: str, gate: Tensor, adapter: torch.dtype, r: int, masked: bool) -> Any:
    return tuned.config(op, gate, adapter, 0, gate.shape[1], r, 1, masked)


def _halves(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Halves of one new matrix [M, 2 I] for dG and dU if G and U are such; else None.

    They are when both are in one storage, with rows as long as both together. The half of dG is
    G's. The product with the one weight of gate and up then reads both gradients as one matrix.
    """
    M, width = gate.shape
    apart = int(up.storage_offset() - gate.storage_offset())
    if (
        gate.stride() != up.stride()
        or gate.stride() != (2 * width, 1)
        or abs(apart) != width
        or gate.dtype != up.dtype
        or gate.untyped_storage() is not up.untyped_storage()
    ):
        return None
    first, second = gate.new_empty((M, 2 * width)).chunk(2, 1)
    return (first, second) if apart > 0 else (second, first)
