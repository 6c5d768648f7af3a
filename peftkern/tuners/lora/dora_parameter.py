"""DoRA on an ``nn.Parameter``: a magnitude for each output, and for each expert where there are E.

    W'_e = m_e / ‖W_e + s B_e A_e‖ · (W_e + s B_e A_e)     norm over the inputs' dimension

The weight of a linear layer runs as DoRA's own operation, with its dropout. Any other parameter is
W' during a call, for all experts (:class:`.parameter.ParamWrapper`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...ops.dora import dora_linear
from ...ops.dora_norm import expert_norms, row_norms
from ...utils.gathering import is_shard
from .dora import DoraVariant, magnitude_of, operation
from .linear import Linear
from .parameter_product import is_product, turned
from .plan import weight_layout


class DoraParameterVariant(DoraVariant, setting="use_dora", layers=("parameter",)):
    """DoRA on a parameter; ``lora_magnitude_vector[name].weight`` is [N], for E experts [E, N].

    N counts the outputs: those of the layer for a ``Conv1D``, whose parameter is [K, N], and else
    the rows of lora_B.
    """

    def weights(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        return layer.get_param(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def outputs_dim(self, layer: Any) -> int:
        if layer.get_param().dim() == 3:
            return 2 if layer.in_first else 1
        return 1 if _is_conv1d(layer) else 0

    def norms_shape(self, layer: Any, weight: Tensor) -> tuple[int, ...]:
        N = weight.shape[self.outputs_dim(layer)]
        return (N,) if weight.dim() == 2 else (weight.shape[0], N)

    def magnitude_shape(self, layer: Any) -> tuple[int, ...]:
        return self.norms_shape(layer, layer.get_param())

    def over(self, layer: Any, factor: Tensor, weight: Tensor) -> Tensor:
        inputs_dim = (1 if weight.dim() == 2 else 3) - self.outputs_dim(layer)
        return factor.unsqueeze(inputs_dim)

    def computed_norms(
        self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any
    ) -> Tensor:
        outputs_dim = self.outputs_dim(layer)
        if is_shard(weight):  # a DTensor cannot be read in blocks or by a kernel
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                wide = torch.promote_types(weight.dtype, torch.float32)
                whole = self.updated(weight.to(wide), A, B, scale, layer)
                dim = (1 if weight.dim() == 2 else 3) - outputs_dim
                return torch.linalg.vector_norm(whole, dim=dim).detach()
        if weight.dim() == 3:
            A, B = layer.of_experts(A, B)
            return expert_norms(weight, A, B, scale, layer.in_first)
        if outputs_dim == 1:
            return row_norms(weight, B.t(), A.t(), scale, transposed=True)
        return row_norms(weight, A, B, scale)

    def updated(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any) -> Tensor:
        left, right = (factor.to(weight.dtype) for factor in layer.apart(A, B))
        product = torch.addmm if weight.dim() == 2 else torch.baddbmm
        return product(weight, left, right, alpha=scale)

    def norms(self, layer: Any, adapter: str) -> Tensor:
        weight, A, B = self.weights(layer, adapter)
        if type(weight) is nn.Parameter and is_product(layer.base_layer, layer.parameter_name):
            return super().norms(layer, adapter)
        # to be W' in a call counts as a write of W, so that norms are never kept
        return self.computed_norms(weight, A, B, layer.scaling[adapter], layer)

    def weight_gain(self, layer: Any, adapter: str) -> Tensor:
        """m / norm in a shape that multiplies the parameter, with a gradient to m alone."""
        return self.over(layer, self.gain(layer, adapter), layer.get_param())

    # ---------------------------------------------------------------- the weight of a linear layer

    def product(self, layer: Any, base: Any, x: Tensor) -> Tensor:
        if not _is_conv1d(layer):
            return super().product(layer, base, x)
        return linear(x, layer.get_param().to(x.dtype).t())

    def low_rank(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        if not _is_conv1d(layer):
            return super().low_rank(layer, adapter, x)
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return linear(linear(x, B.t()), A.t())

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = Linear.product_call(layer, x, adapter)
        if call is None:
            return None
        weight, bias, A, B, scale, p, transposed = turned(call)
        magnitude = magnitude_of(layer, adapter)
        norms = self.norms(layer, adapter)
        p = p if layer.training else 0.0
        return dora_linear(x, weight, bias, A, B, magnitude, scale, p, transposed, norms)

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        if not is_product(layer.base_layer, layer.parameter_name):
            return None
        if Linear.product_reason(layer, adapter) is not None:
            return None
        return operation(layer, adapter)

    def decline(self, layer: Any, adapter: str) -> str:
        return "DoRA has an operation of its own"


def _is_conv1d(layer: Any) -> bool:
    """True for the weight [K, N] of transformers' ``Conv1D``, whose outputs are its columns."""
    base = layer.base_layer
    return is_product(base, layer.parameter_name) and bool(weight_layout(base.__class__))
