"""``Fp8Linear``: a frozen linear layer in e4m3, with a float32 scale for blocks of 128 x 128.

W is quantised by the rule of :mod:`.fp8_numbers`. The blocks are square, so that one copy serves
X Wᵀ and dY W. Names and shapes in its state dict are those of DeepSeek-V3's and transformers'
FineGrainedFP8 checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parameter import Parameter

from ...utils.private import make_wrapper
from ..tracing import is_compiling
from .formats import Found, as_weight
from .fp8 import Fp8, chosen
from .fp8_numbers import E4M3, quantised, shape_error
from .linear import frozen_linear
from .repack import State

BLOCK = (128, 128)


class Fp8Linear(nn.Linear):
    """Y = X Wᵀ + bias with W [N, K] in e4m3; X [..., K], Y [..., N] in X's dtype.

    Made from a dense layer by :func:`peftkern.quantize_base`. ``to`` and ``half`` move W and its
    scales and change the dtype of the bias alone.

    Attributes:
        weight: float8_e4m3fn [N, K], never trained.
        weight_scale_inv: float32 [ceil(N / 128), ceil(K / 128)], what e4m3 numbers are multiplied
            with (the name is DeepSeek-V3's).
        bias: [N] or None.
        compute_dtype: the dtype of the dense weight that this was made of.
    """

    weight_scale_inv: Tensor

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = dense.weight.shape
        self.compute_dtype = dense.weight.dtype
        q, scale = quantised(dense.weight.detach(), BLOCK)
        self.weight = Parameter(q, requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)
        self.register_parameter("bias", dense.bias)
        self.train(dense.training)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers that W stands for."""
        return self.compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        found = read(self)
        if isinstance(found, str):
            raise RuntimeError(f"Fp8Linear cannot compute: {found}")
        if make_wrapper is None or is_compiling():
            weight = found.packed.dense(input.dtype)
            return linear(input, weight, found.bias)
        return frozen_linear(input, as_weight(found.packed, input), found.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        kept = (self.weight, self.weight_scale_inv)

        def moved(t: Tensor) -> Tensor:
            new: Tensor = fn(t)
            if new.dtype != t.dtype and any(t is k or t is k.data for k in kept):
                return t.to(new.device)
            return new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, e4m3 in blocks of {BLOCK[0]} x {BLOCK[1]}"


def read(module: Any) -> Found | str:
    """The weight of an :class:`Fp8Linear`, or the reason that it cannot be read."""
    q, scale = module._parameters.get("weight"), module._buffers.get("weight_scale_inv")
    if q is None or scale is None:
        return "it has no weight, or no scales (`weight_scale_inv`)"
    if q.is_meta or scale.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if q.dtype != E4M3 or scale.dtype != torch.float32:
        return f"its weight is {q.dtype} and its scales {scale.dtype}: another dtype was assigned"
    if (wrong := shape_error(q, scale, BLOCK)) is not None:
        return wrong
    name = f"fp8 in blocks of {BLOCK[0]} x {BLOCK[1]}"
    return Found(Fp8(q, scale, BLOCK, name, compute=chosen(module)), module._parameters["bias"])


def repacked(module: Any, weight: Tensor) -> State:
    """What an :class:`Fp8Linear` holds for another weight [N, K]."""
    q, scale = quantised(weight.to(module.weight.device), BLOCK)
    return State({"weight": Parameter(q, requires_grad=False), "weight_scale_inv": scale})
