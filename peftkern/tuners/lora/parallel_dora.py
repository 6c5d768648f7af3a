"""DoRA on layers that tensor parallelism has sharded (:mod:`.parallel`, :mod:`.dora`).

    W' = m / ‖W + s B A‖ · (W + s B A)          a norm for each output

A column-parallel layer's rank has whole rows of W + s B A, and m is sharded as they are. Of a
row-parallel layer each rank has a part of every row: the squares of the parts' norms are summed
over the ranks, N numbers a call, and each rank has all of m. Each rank's part of the output is
scaled before the ranks sum, so that a call is one operation here too, and sends nothing more:

    columns:  y_i = m_i / n_i ∘ (x W_iᵀ + s · (x Aᵀ) B_iᵀ)
    rows:     Y = Σ_i m / n ∘ (x_i W_iᵀ + s · (x_i A_iᵀ) Bᵀ)          backward: dm and dB are summed

An embedding's output is whole on every rank, and so is its m.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops import autocast
from ...ops.dora import dora_linear
from ...ops.dora_norm import gain, row_norms
from ...utils.collectives import all_columns, from_part, local, norms_of_all, shared_out, span
from ..tensor_parallel import EMBEDDINGS
from .dora import DoraEmbeddingVariant, DoraLayer, DoraLinearVariant, DoraVariant


class _ParallelDora(DoraVariant):
    """What both kinds of layers share. ``weights`` and ``computed_norms`` are this rank's parts."""

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        weight, A, B = self.weights(layer, adapter)
        N = layer.out_features
        if A.is_meta or weight.is_meta:
            whole = torch.empty(N, dtype=A.dtype, device="meta")
            found: Tensor = shared_out(whole, layer.mesh, self.sharded(layer), trainable)
        else:
            norms = self.computed_norms(weight, A, B, layer.scaling[adapter], layer)
            norms = self.of_magnitude(layer, norms).to(A.dtype)
            found = from_part(norms, layer.mesh, None if self.sharded(layer) is None else N)
        dora = DoraLayer(found, trainable)
        dora.training = layer.training
        layer.lora_magnitude_vector[adapter] = dora

    def sharded(self, layer: Any) -> int | None:
        """The dimension in which m is sharded; None: each rank has all of it."""
        return None

    def of_magnitude(self, layer: Any, norms: Tensor) -> Tensor:
        """The norms of those outputs of which this rank has m."""
        return norms

    def magnitude(self, layer: Any, adapter: str) -> Tensor:
        return local(layer.lora_magnitude_vector[adapter].weight)

    def norms(self, layer: Any, adapter: str) -> Tensor:
        return DoraVariant.norms(self, layer, adapter)


class ParallelDoraLinear(
    _ParallelDora, DoraLinearVariant, setting="use_dora", layers=("parallel linear",)
):
    """DoRA on a linear layer that ranks share out."""

    def sharded(self, layer: Any) -> int | None:
        return 0 if layer.style.dim == 0 else None

    def weights(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
        weight, A, B = (local(module.weight).detach() for module in tensors)
        return weight, A, B

    def computed_norms(
        self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any
    ) -> Tensor:
        norms = row_norms(weight, A, B, scale)
        return norms if layer.style.dim == 0 else norms_of_all(norms, layer.mesh.get_group())

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        part = layer.local_projection(x)
        if part is None:
            return None
        # of a row-parallel layer each rank's part of the output gives a part of dm
        m = local(layer.lora_magnitude_vector[adapter].weight, sums=layer.style.dim == 1)
        weight, bias, A, B, scale, p, _ = part
        norms = self.norms(layer, adapter)
        y = dora_linear(layer.enter(x), weight, bias, A, B, m, scale, p, norms=norms)
        found: Tensor = layer.leave(y)
        return found

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        low = layer.lora_A[adapter].weight.dtype
        if not autocast.is_on(x):
            x = x.to(low)
        g = layer.as_output(self.gain(layer, adapter))
        dropped = layer._dropped(adapter, x)
        if isinstance(layer.lora_dropout[adapter], nn.Identity) or not layer.training:
            bias = layer.base_layer.bias
            if bias is not None:
                bias = local(bias)
                bias = layer.as_output(bias)
            product = result if bias is None else result - bias
        else:
            product = layer.base_product(dropped)
        low = torch.promote_types(result.dtype, low)
        # 1 is subtracted before rounding, as in DoraVariant.update
        more, factor = (f.to(low) for f in (g - 1, g * layer.scaling[adapter]))
        return result + more * product + factor * layer.low_rank(adapter, dropped)


class ParallelDoraEmbedding(
    _ParallelDora, DoraEmbeddingVariant, setting="use_dora", layers=("parallel embedding",)
):
    """DoRA on an embedding that ranks share out; each of them has m and gets the whole output."""

    def weights(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        left, right = layer._factors(adapter)  # [V, r] and [r, D], the parts of this rank
        return local(layer.base_layer.weight).detach(), left.T, right.T

    def computed_norms(
        self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any
    ) -> Tensor:
        norms = row_norms(weight, A, B, scale, transposed=True)
        by_rows = EMBEDDINGS[layer.plan_name] == 0
        return norms_of_all(norms, layer.mesh.get_group()) if by_rows else norms

    def of_magnitude(self, layer: Any, norms: Tensor) -> Tensor:
        if EMBEDDINGS[layer.plan_name] == 0:
            return norms
        return all_columns(norms, layer.out_features, layer.mesh)

    def gain(self, layer: Any, adapter: str) -> Tensor:
        norms = self.of_magnitude(layer, self.norms(layer, adapter))
        return gain(self.magnitude(layer, adapter), norms)

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        _, A, B = self.weights(layer, adapter)
        norms = self.computed_norms(base, A, B, layer.scaling[adapter], layer)
        m = self.magnitude(layer, adapter)
        if EMBEDDINGS[layer.plan_name] == 1:
            start, stop = span(layer.out_features, layer.mesh)
            m = m[start:stop]
        factor = self.over(layer, gain(m.to(norms), norms), weight)
        return factor * self.updated(weight, A, B, layer.scaling[adapter], layer)
