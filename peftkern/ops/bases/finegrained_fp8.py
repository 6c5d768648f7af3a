"""transformers' ``FP8Linear``: float8 blocks as DeepSeek-V3 has them, or one scale for a weight.

    W = weight ∘ weight_scale_inv, a scale for block_size[0] x block_size[1] elements

transformers itself quantises X too, in its GPU kernels; its backward dequantises W and does not.
Here X is quantised with ``set_base_compute(model, "fp8")`` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .formats import Found, Unusable
from .fp8 import Fp8, chosen
from .fp8_numbers import cast_error, is_cast, quantised, shape_error
from .repack import State


def read(module: Any) -> Found | str:
    """The weight of an ``FP8Linear``, or the reason that it cannot be read."""
    owner: Any = next(c for c in type(module).__mro__ if c.__name__ == "FP8Linear")
    if type(module).forward is not owner.forward:
        return f"a {type(module).__name__} computes its product in its own way"
    q = module._parameters.get("weight")
    scale = module._parameters.get("weight_scale_inv")
    if q is None or scale is None:
        return "it has no weight, or no scales (`weight_scale_inv`)"
    if q.is_meta or scale.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if q.dtype == torch.int8:
        return "its weight is packed in 4 bits (FP4)"
    if q.dtype.itemsize != 1 or not q.is_floating_point():
        if q.is_floating_point() and is_cast(q):
            return Unusable(cast_error(q))
        return f"its weight is {q.dtype}: it was dequantised, and transformers multiplies with it"
    block = None if module.block_size is None else (module.block_size[0], module.block_size[1])
    if (wrong := shape_error(q, scale, block)) is not None:
        return wrong
    name = "fp8, one scale" if block is None else f"fp8 in blocks of {block[0]} x {block[1]}"
    packed = Fp8(q, scale, block, f"{name} (transformers)", True, chosen(module))
    return Found(packed, module._parameters.get("bias"))


def repacked(module: Any, weight: Tensor) -> State:
    """What an ``FP8Linear`` holds for another weight [N, K], by the rule of transformers' loader.

    Each block's scale is max |W| / 448, in E8M0 the next power of two.
    """
    q, scale = module.weight, module.weight_scale_inv
    block = q.shape if module.block_size is None else module.block_size
    new, inverse = quantised(weight.to(q.device), (block[0], block[1]), scale.dtype)
    held = {
        "weight": Parameter(new, requires_grad=False),
        "weight_scale_inv": Parameter(inverse.reshape(scale.shape), requires_grad=False),
    }
    return State(held)
