"""VeLoRA (Miles et al., 2024, arXiv 2405.17991): the gradient of A from compressed inputs.

A's input x [T, K] is not kept for backward. It is split into G groups x_g of K / G features, and
the products z = x_g · v, [T, G], with one unit vector v are kept (equation 1). In the gradient of
A, and only there, s · z v replaces the input (equation 2). The output and all other gradients are
those of plain LoRA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ...ops import autocast
from ...ops.tracing import is_tracing
from .._buffer_dict import BufferDict
from .training_variants import TrainedOtherwise


def _get_group_dim(in_features: int, num_groups: int) -> int:
    """D, the number of features of a group; the last group may need zeros to reach it."""
    return -(-in_features // num_groups)


def _reshape_to_grouped_subtokens(x: Tensor, num_groups: int) -> Tensor:
    """``x`` [..., K] as groups [T, G, D], filled up with zeros."""
    size = _get_group_dim(x.shape[-1], num_groups)
    missing = num_groups * size - x.shape[-1]
    return (pad(x, (0, missing)) if missing else x).reshape(-1, num_groups, size)


def _compress_activations(x: Tensor, embed: Tensor, num_groups: int) -> Tensor:
    """The products [T, G] of the groups of ``x`` [..., K] with the vector ``embed`` [D]."""
    return _reshape_to_grouped_subtokens(x, num_groups) @ embed


def _reconstruct_activations(
    compressed: Tensor, embed: Tensor, in_features: int, velora_scale: float
) -> Tensor:
    """The input [T, K] rebuilt from the products [T, G] of :func:`_compress_activations`."""
    groups = compressed[..., None] * embed
    return groups.flatten(1)[:, :in_features] * velora_scale


def _normalize_projection(embed: Tensor) -> Tensor:
    """``embed`` [D] scaled to norm 1, in float32; for zeros, a vector of equal numbers."""
    embed = embed.float()
    norm = torch.linalg.vector_norm(embed)
    ones = torch.full_like(embed, embed.numel() ** -0.5)
    # torch.where and not `if`, for which the host would wait for the device
    return torch.where(norm == 0, ones, embed / norm)


class VeloraFunction(torch.autograd.Function):
    """x Wᵀ + b for x [..., K] and W [r, K], which keeps the compressed x for the gradient of W.

    Arguments: x, W, b or None, ``embed`` [D], number of groups, scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        embed: Tensor,
        num_groups: int,
        velora_scale: float,
    ) -> Tensor:
        compressed = None
        if ctx.needs_input_grad[1]:
            compressed = _compress_activations(x, embed.to(x.dtype), num_groups)
        ctx.save_for_backward(compressed, weight, embed)
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, velora_scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compressed, weight, embed = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight.to(grad.dtype)).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            x = _reconstruct_activations(
                compressed.to(grad.dtype), embed.to(grad.dtype), ctx.shape[-1], ctx.scale
            )
            of_weight = (grad.t() @ x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None, None, None


class VeloraLinearVariant(TrainedOtherwise, setting="velora_config", layers=("linear",)):
    """VeLoRA on linear layers; ``lora_velora_embed[adapter]`` [D] is saved with the adapter.

    It is not saved whether that vector was made of a batch already. So "batch_average_once" makes
    it again when a training is continued, as in HF PEFT.
    """

    name = "VeLoRA"
    value_stores = {
        "lora_velora_embed": partial(BufferDict, {}, persistent=True),
        "lora_velora_initialized": dict,
        "lora_velora_num_groups": dict,
        "lora_velora_init_type": dict,
        "lora_velora_scale": dict,
    }
    refusals = {
        "attention": "MultiheadAttention does not support VeLoRA, please set `velora_config=None`.",
        "parameter": "lora.ParamWrapper does not work when `velora_config` is set.",
        **dict.fromkeys(
            ("conv1d", "conv2d", "conv3d"), "VeLoRA does not support adapting conv layers."
        ),
    }

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        own = config.velora_config
        for name in ("num_groups", "init_type", "scale"):
            getattr(layer, f"lora_velora_{name}")[adapter] = getattr(own, name)
        base = layer._some_weight()
        size = _get_group_dim(layer.in_features, own.num_groups)
        random = own.init_type == "random"
        embed = (torch.randn if random else torch.zeros)(size, device=base.device, dtype=base.dtype)
        if random:
            embed = _normalize_projection(embed).to(base.dtype)
        layer.lora_velora_embed[adapter] = embed.to(layer.lora_A[adapter].weight.dtype)
        layer.lora_velora_initialized[adapter] = random

    def differs(self, layer: Any) -> bool:
        return layer.training and torch.is_grad_enabled() and not is_tracing()

    @torch.no_grad()
    def follow(self, layer: Any, adapter: str, x: Tensor) -> None:
        """Make the vector anew from ``x`` [..., K], if the adapter's ``init_type`` says so."""
        kind = layer.lora_velora_init_type[adapter]
        ready = layer.lora_velora_initialized[adapter]
        if kind == "random" or (kind == "batch_average_once" and ready):
            return
        groups = _reshape_to_grouped_subtokens(x, layer.lora_velora_num_groups[adapter])
        embeds = layer.lora_velora_embed
        # a new tensor, as an earlier call needs the old one for its backward
        embeds[adapter] = _normalize_projection(groups.flatten(0, 1).mean(0)).to(embeds[adapter])
        layer.lora_velora_initialized[adapter] = True

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if not self.differs(layer):
            return result + layer._update(adapter, x)
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if not autocast.is_on(x):
            x = layer._cast_input_dtype(x, A.weight.dtype)
        x = layer.lora_dropout[adapter](x)
        self.follow(layer, adapter, x)
        low = VeloraFunction.apply(
            x,
            A.weight,
            A.bias,
            layer.lora_velora_embed[adapter],
            layer.lora_velora_num_groups[adapter],
            layer.lora_velora_scale[adapter],
        )
        return result + B(low) * layer.scaling[adapter]
