"""torchao's ``Float8Tensor`` as the weight of a linear layer: a scale for the tensor, row or block.

A weight of ``Float8DynamicActivationFloat8WeightConfig`` also asks for X to be quantised, by
products that only a GPU has, and which torchao does not differentiate. Here X is quantised with
``set_base_compute(model, "fp8")`` alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .formats import Found
from .fp8 import Fp8, chosen, shape_error


def read(module: Any) -> Found | str:
    """The weight of a linear layer with a ``Float8Tensor``, or the reason that it can't be read."""
    if type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__} computes its product in its own way"
    held = module._parameters["weight"]
    q, scale = held.qdata, held.scale
    if q.is_meta or scale.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if q.dim() != 2:
        return f"its weight is of shape {tuple(q.shape)}"
    rows, columns = held.block_size or q.shape
    block: tuple[int, int] | None = (rows, columns)
    kind = f"fp8 in blocks of {rows} x {columns}"
    if scale.numel() == 1:
        block, kind = None, "fp8, one scale"
    elif block == (1, q.shape[1]):
        block, kind = None, "fp8, a scale a row"
    if (wrong := shape_error(q, scale, block)) is not None:
        return wrong
    packed = Fp8(q, scale, block, f"{kind} (torchao)", compute=chosen(module))
    return Found(packed, module._parameters.get("bias"))
