"""LoRA on convolutions (``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``).

    Y = base(X) + scaling · B ∗ (A ∗ drop(X))

A is a convolution [r, C_in, *kernel] with the base layer's stride and padding, B one of
[C_out, r / groups, 1, …] with the base layer's groups, as in HF PEFT. With one group their product
is a kernel of the base's shape; only then can it be merged.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...utils.handing import HERE, hand_over
from ...utils.warning import PeftWarning
from .base import NOTHING, LoraLayer
from .inits.random import placed
from .linear import Linear


class _ConvNd(nn.Module, LoraLayer):
    """A frozen convolution with low-rank updates: [M, C_in, *size] -> [M, C_out, *size]."""

    dims: int  # number of spatial dimensions

    # attributes of PEFT's layers that are always empty here
    lora_embedding_A = lora_embedding_B = NOTHING
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    # calls the base, then adds each update, as in a linear layer that cannot be fused
    _forward_general: Any = Linear._forward_general
    _base_output: Any = Linear._base_output
    _update: Any = Linear._update

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: LoraConfig | None = None,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_lora(base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        weight: Any = self.get_base_layer().weight
        found = weight.dim()
        if found != self.dims + 2:
            kind = type(self).__name__
            raise ValueError(
                f"{kind} layer kernel must have {self.dims + 2} dimensions, not {found}"
            )
        self.fan_in_fan_out = False
        self._first_adapter(adapter_name, config, r, lora_alpha, kwargs)

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        base: Any = self.get_base_layer()
        ones = (1,) * self.dims
        # HF PEFT's A is never dilated. That works only with padding "same", and there its numbers
        # are kept. In other cases HF PEFT fails at the first call, and A here is dilated.
        dilation = ones if base.padding == "same" else base.dilation
        with torch.device("meta") if place["device"] == "meta" else nullcontext():
            kind = type(base)  # factors of a subclass compute in the same way as the subclass
            a = kind(
                self.in_features,
                r,
                base.kernel_size,
                base.stride,
                base.padding,
                bias=False,
                **({} if tuple(dilation) == ones else {"dilation": dilation}),
            )
            b = kind(r, self.out_features, ones, ones, groups=base.groups, bias=config.lora_bias)
        init = config.init_name
        if init is not False:
            if init == "gaussian":
                nn.init.normal_(a.weight, std=1 / r)
            else:  # torch's own initialisation
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
            if b.bias is not None:
                nn.init.zeros_(b.bias)
        for store, layer in ((self.lora_A, a), (self.lora_B, b)):
            for parameter in layer.parameters():
                parameter.data = placed(parameter.data, self._base_dtype(), place)
            layer.requires_grad_(trainable)
            layer.train(self.training)
            store._modules[name] = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        return self._forward_general(x, *args, **kwargs)

    def _cannot_merge(self, adapter: str) -> str | None:
        base: Any = self.get_base_layer()
        if base.groups == 1:
            return None
        # through A each output depends on all inputs, which a grouped kernel cannot express
        return "Merging is not supported for _ConvNd layers with groups > 1!"

    def _check_mergeable(self, names: list[str]) -> list[str]:
        names = super()._check_mergeable(names)
        base: Any = self.get_base_layer()
        said = None
        if base.padding == "same" and any(d != 1 for d in base.dilation):
            said = "lora_A is not dilated and the base layer is"
        elif base.padding_mode != "zeros" and base.padding != "valid" and any(base.padding):
            said = f"lora_A pads with zeros and the base layer by {base.padding_mode!r}"
        if names and said is not None:
            warnings.warn(
                f"Merging changes the outputs of a {type(base).__name__}: {said}, as in HF PEFT.",
                PeftWarning,
                stacklevel=4,
            )
        return names

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        if (reason := self._cannot_merge(adapter)) is not None:
            raise NotImplementedError(reason)
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return B.weight.flatten(1), A.weight.flatten(1)

    def decline_reason(self) -> str | None:
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        if not any(n in self.lora_A for n in self.active_adapters):
            return "no active adapter has weights here"
        if (of_variant := self._variant_reason()) is not None:
            return of_variant
        base: Any = self.get_base_layer()
        said = "a convolution is left to torch, base and update one after the other"
        if base.padding_mode != "zeros":
            said += f"; the update pads with zeros, as HF PEFT's, the base {base.padding_mode}"
        if base.groups > 1:
            said += f"; {base.groups} groups, so it cannot be merged"
        return said

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class Conv1d(_ConvNd):
    """LoRA on ``nn.Conv1d``."""

    dims = 1
    layer_kind = "conv1d"


class Conv2d(_ConvNd):
    """LoRA on ``nn.Conv2d``."""

    dims = 2
    layer_kind = "conv2d"


class Conv3d(_ConvNd):
    """LoRA on ``nn.Conv3d``."""

    dims = 3
    layer_kind = "conv3d"
