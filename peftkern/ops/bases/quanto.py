"""optimum-quanto's ``QLinear`` with a frozen weight: int8, fp8, int4 and int2; x not quantised.

The products run in the dtype of the scales, as quanto's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .formats import Found, OwnProduct
from .int8 import Int8
from .owned import Owned
from .repack import State

_KINDS = ("WeightQBytesTensor", "WeightQBitsTensor")


def read(module: Any) -> Found | str:
    """The weight of a ``QLinear``, or the reason that it cannot be read."""
    held = module._parameters["weight"]
    if not module.frozen:
        return "quanto quantises its weight in every call: it is not frozen (optimum.quanto.freeze)"
    kind = type(held).__name__
    if kind not in _KINDS:
        return f"the weight is a {kind}, packed for the kernels of one kind of device"
    names, _ = held.__tensor_flatten__()  # the owner's names of its parts, as they are saved
    parts = [getattr(held, name) for name in names]
    if any(part.is_meta for part in parts):
        return "its weight is on the meta device (offloaded or not loaded yet)"
    bias = module._parameters.get("bias")
    if kind == _KINDS[0] and parts[0].dtype == torch.int8 and held.axis == 0:
        q, scale = parts
        found = Found(Int8(q, scale, "quanto", scale.dtype), bias)
    else:
        form = f"{held.qtype.name.removeprefix('q')} (quanto)"
        found = Found(Owned(held, tuple(names), form, held.dtype), bias)
    if module.activation_qtype is not None:
        reason = f"quanto quantises the activations too, to {module.activation_qtype.name}"
        return OwnProduct(reason, found)
    return found


def repacked(module: Any, weight: Tensor) -> State:
    """What the layer holds for another weight [N, K]: the ``qweight`` of the layer unfrozen."""
    held = module.weight
    loose: Any = module.__class__.__new__(module.__class__)
    loose.__dict__ = {**module.__dict__}
    # a plain Parameter in the place of the packed one, in dicts of its own
    loose.__dict__["_parameters"] = {"weight": Parameter(weight.to(held.device, held.dtype))}
    with torch.no_grad():
        made = loose.qweight
    return State({"weight": Parameter(made, requires_grad=False)})
