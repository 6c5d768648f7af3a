"""LLM.int8 of bitsandbytes (Dettmers et al., 2022, arXiv 2208.07339): int8 with a scale a row.

    w_nk = q_nk · s_n / 127

In training on a CPU bitsandbytes multiplies by the weight as numbers. In eval mode, and always on a
GPU, it quantises each row of x to int8 too and multiplies integers; columns of x in which an
element reaches the layer's threshold stay as numbers. Gradients of x always pass through the weight
as numbers. All this is done here in the same way, with its own operators.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .formats import Found, Unusable
from .int8 import Int8
from .repack import State
from .weight import Packed

_PER_STEP = 6.200124e-05  # 1 / 127², as bitsandbytes writes it


class Bnb8(Packed):
    """A weight of ``bitsandbytes.nn.Linear8bitLt``."""

    __slots__ = ("bits", "scales", "threshold", "integers", "shape", "device")

    format = "int8 (bitsandbytes)"

    def __init__(self, bits: Tensor, scales: Tensor, threshold: float, integers: bool) -> None:
        self.bits, self.scales, self.threshold = bits, scales, threshold
        self.integers = integers  # True: x is quantised too
        self.shape, self.device = (bits.shape[0], bits.shape[1]), bits.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.bits, self.scales

    @property
    def quantises_input(self) -> bool:  # type: ignore[override]
        return self.integers

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        return not self.integers

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.bits.to(dtype).mul_(self.scales.unsqueeze(1).mul(1.0 / 127.0))

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        if not self.integers or not x.numel():
            if x.dtype is torch.float32:
                return self.as_numbers().product(x, y)
            return super().product(x, y)
        part = self.product_of_integers(x)
        return part if y is None else y.add_(part)

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        if dy.dtype is torch.float32:
            return self.as_numbers().grad_input(dy, dx)
        return super().grad_input(dy, dx)

    def as_numbers(self) -> Int8:
        """The weight-only one of the same numbers, whose products scale what is smallest."""
        return Int8(self.bits, self.scales.mul(1.0 / 127.0), "bitsandbytes")

    def product_of_integers(self, x: Tensor) -> Tensor:
        """x Wᵀ [M, N] with the rows of x [M, K] quantised to int8."""
        ops, bits, scales = torch.ops.bitsandbytes, self.bits, self.scales
        half = x.to(torch.float16)
        if x.shape[0] == 1 and x.is_cpu:
            # the owner's operators on one row are mostly the host's time; these give the same bits
            largest = half.abs().max().item()
            if 0.0 < largest < (self.threshold or math.inf):
                row = half.float().mul_(127.0 / largest).round_().to(torch.int8)
                product: Tensor = ops.int8_linear_matmul.default(row, bits)
                return product.mul(scales.mul(largest)).mul_(_PER_STEP).to(x.dtype)
        if half is x and self.threshold > 0.0:
            half = x.clone()  # the operator sets outliers to 0 in place for a moment
        rows, of_rows, outliers = ops.int8_vectorwise_quant.default(half, self.threshold)
        y: Tensor
        if self.threshold > 0.0:
            y, _ = ops.int8_mixed_scaled_mm.default(x, rows, bits, of_rows, scales, outliers)
        else:
            y = ops.int8_scaled_mm.default(rows, bits, of_rows, scales, None, x.dtype)
        return y


def read(module: Any) -> Found | str:
    """The weight of a ``Linear8bitLt``, or the reason that it cannot be read."""
    weight, state = module._parameters.get("weight"), module.state
    if weight is None or weight.is_meta:
        return Unusable("its weight is on the meta device (offloaded or not loaded yet)")
    if state.has_fp16_weights:
        return "its weight is dense and quantised in every call (has_fp16_weights)"
    # the first forward moves both from the weight to the state
    own = weight.__dict__
    bits = own.get("CB")
    if bits is None:
        bits = weight if state.CB is None else state.CB
    scales = own.get("SCB")
    if scales is None:
        scales = state.SCB
    if bits.dtype != torch.int8 or scales is None:
        return Unusable(
            "its 8-bit weight has no statistics: it is quantised when it is moved to a device"
        )
    N, K = module.out_features, module.in_features
    if bits.shape != (N, K) or scales.numel() != N:
        return Unusable(
            f"its 8-bit weight is of shape {tuple(bits.shape)} with {scales.numel()} scales, and "
            f"the layer of {(N, K)} (out, in)"
        )
    if scales.device != bits.device:
        return Unusable(
            f"its 8-bit weight is on {bits.device}, and its statistics are on {scales.device}"
        )
    integers = not module.training or bits.device.type not in ("cpu", "xpu")
    found = Bnb8(bits, scales, state.threshold, integers)
    return Found(found, module._parameters.get("bias"))


def keep_in_state(module: Any) -> None:
    """Put the statistics into the layer's own state, where its first forward would move them.

    It takes them from the weight, so that a second layer with the same weight would find none.
    """
    own, state = module.weight.__dict__, module.state
    for name in ("CB", "SCB"):
        if own.get(name) is not None:
            setattr(state, name, own[name])


def repacked(module: Any, weight: Tensor) -> State:
    """What a ``Linear8bitLt`` holds for another weight [N, K]; its ``Int8Params`` quantise it."""
    old, state = module.weight, copy.copy(module.state)
    state.reset_grads()  # it has the statistics of the old weight, after a first forward
    made = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)
    return State({"weight": made, "state": state})
