"""torchao's integer tensors as the weight of a linear layer: ``Int8Tensor`` and its relatives.

Weight-only ones are read: ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` (1 to 8 bit in groups) and
``Int4Tensor`` (two codes in a byte, W = q · scale + zero, products in bf16). Those that quantise
the activations have no gradients in torchao, so that their products stay their owner's work: their
weights are read to merge into, and to make dense. Layouts for one device's kernels are not read.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .formats import Found, OwnProduct
from .int8 import Int8
from .owned import Owned
from .repack import State
from .weight import Packed


class Int4(Packed):
    """An ``Int4Tensor``: q [N, K / 2] of two signed codes a byte, statistics [K / group, N]."""

    __slots__ = ("tensors", "shape", "device")

    format = "int4 (torchao)"
    fixed = torch.bfloat16

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.tensors = (q, scale, zero)
        self.shape, self.device = (q.shape[0], 2 * q.shape[1]), q.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        q, scale, zero = self.tensors
        q = q.view(torch.int8)
        pairs = torch.stack([q << 4 >> 4, q >> 4], -1)  # signed: shifts keep the sign
        codes = pairs.flatten(1).float()
        groups: Tensor = codes.unflatten(1, (scale.shape[0], -1))
        groups.mul_(scale.t().float().unsqueeze(2)).add_(zero.t().float().unsqueeze(2))
        return groups.flatten(1).to(dtype)


def read(module: Any) -> Found | str:
    """The weight of a linear layer of torchao, or the reason that it cannot be read."""
    if type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__} computes its product in its own way"
    held = module._parameters["weight"]
    kind = type(held).__name__
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor"):
        return f"the weight is a {kind}, packed for the kernels of one kind of device"
    q, scale, zero = held.qdata, held.scale, held.zero_point
    if q.is_meta or scale.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if q.dim() != 2:
        return f"its weight is of shape {tuple(held.shape)}"
    if getattr(held, "act_pre_scale", None) is not None:
        return f"its {kind} scales the activations first"
    bias = module._parameters.get("bias")
    if kind == "Int4Tensor" and held.activation_dtype != torch.bfloat16:
        reason = f"its Int4Tensor asks for activations in {held.activation_dtype}"
        return OwnProduct(reason, Found(Int4(q, scale, zero), bias))
    packed: Packed
    if kind == "Int4Tensor":
        packed = Int4(q, scale, zero)
    elif kind == "Int8Tensor" and scale.numel() in (1, q.shape[0]) and scale.shape[-1] == 1:
        packed = Int8(q, scale, "torchao")
    else:
        bits = "int8" if kind == "Int8Tensor" else str(held.target_dtype).removeprefix("torch.")
        names = ("qdata", "scale", "zero_point")
        packed = Owned(held, names, f"{bits} in groups of {held.block_size[-1]} (torchao)")
    found = Found(packed, bias)
    if getattr(held, "act_quant_kwargs", None) or getattr(held, "activation_quantization", None):
        return OwnProduct(f"its {kind} asks for quantised activations", found)
    return found


def repacked(module: Any, weight: Tensor) -> State:
    """What the layer holds for another weight [N, K], by its tensor's own ``from_hp``."""
    held = module.weight
    kind, block = type(held), list(held.block_size)
    owner: Any = sys.modules[kind.__module__]
    weight = weight.to(held.device, held.dtype)
    zero = held.zero_point
    way = owner.MappingType.SYMMETRIC
    if zero is not None and bool(zero.any()):
        way = owner.MappingType.ASYMMETRIC
    made: Tensor
    if kind.__name__ == "Int4Tensor":
        made = kind.from_hp(weight, block, held.activation_dtype)
    elif kind.__name__ == "Int8Tensor":
        granularity = owner.PerGroup(block[1])
        if block == list(held.shape):
            granularity = owner.PerTensor()
        elif block[1] == held.shape[1]:
            granularity = owner.PerRow()
        made = kind.from_hp(
            weight,
            granularity,
            way,
            act_quant_kwargs=held.act_quant_kwargs,
            act_quant_scale=held.act_quant_scale,
            act_quant_zero_point=held.act_quant_zero_point,
            reduce_range=held.reduce_range,
        )
    else:
        made = kind.from_hp(
            weight,
            tuple(block),
            held.target_dtype,
            mapping_type=way,
            activation_quantization=held.activation_quantization,
        )
    return State({"weight": Parameter(made, requires_grad=False)})
