"""torchao's ``Float8Tensor`` as the weight of a linear layer: a scale for the tensor, row or block.

A weight of ``Float8DynamicActivationFloat8WeightConfig`` also asks for X to be quantised, by
products that only a GPU has, and which torchao does not differentiate. Here X is quantised with
``set_base_compute(model, "fp8")`` alone.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .formats import Found
from .fp8 import Fp8, chosen
from .fp8_numbers import shape_error
from .repack import State


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


def repacked(module: Any, weight: Tensor) -> State:
    """What the layer holds for another weight [N, K], by torchao's ``Float8Tensor.from_hp``."""
    held = module.weight
    owner: Any = sys.modules[type(held).__module__]
    asked = held.act_quant_kwargs
    if asked is not None:
        granularity = asked.granularity
    elif held.scale.numel() == 1:
        granularity = owner.PerTensor()
    elif tuple(held.block_size) == (1, held.shape[1]):
        granularity = owner.PerRow()
    else:
        raise ValueError(f"torchao makes no weights with blocks of {tuple(held.block_size)} again")
    made = type(held).from_hp(
        weight.to(held.device, held.dtype),
        float8_dtype=held.qdata.dtype,
        granularity=granularity,
        mm_config=held.mm_config,
        kernel_preference=held.kernel_preference,
        act_quant_kwargs=asked,
    )
    return State({"weight": Parameter(made, requires_grad=False)})
