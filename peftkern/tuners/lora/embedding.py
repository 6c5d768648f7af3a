"""LoRA on ``nn.Embedding``: Y = W[i] + scaling · (A[:, i])ᵀ Bᵀ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...configs.lora import LoraConfig
from ...utils.handing import HERE, TokenNames, hand_over
from . import inits
from .base import NOTHING, LoraLayer
from .inits.random import placed
from .row_adapters import AdapterNames
from .variant import take_kwargs


class Embedding(nn.Module, LoraLayer):
    """A frozen embedding with low-rank updates: it gathers rows of Aᵀ, r numbers for each token."""

    layer_kind = "embedding"
    # attributes of PEFT's layers that are always empty here
    lora_A = lora_B = NOTHING
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

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
        self._init_lora(
            base_layer, lora_embedding_A=nn.ParameterDict(), lora_embedding_B=nn.ParameterDict()
        )
        self.fan_in_fan_out = False
        self._first_adapter(adapter_name, config, r, lora_alpha, kwargs)

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias=True is not supported for {type(self).__name__}.")
        shapes = (r, self.in_features), (self.out_features, r)
        if place["device"] == "meta":
            A, B = (torch.empty(shape, **place) for shape in shapes)
        else:  # drawn in HF PEFT's order, see `inits.random`
            A, B = (torch.randn(shape) for shape in shapes)
            if config.init_name is not False:
                A, B = A.zero_(), B.normal_()
            A, B = (placed(value, self._base_dtype(), place) for value in (A, B))
        self.lora_embedding_A[name] = nn.Parameter(A, requires_grad=trainable)
        self.lora_embedding_B[name] = nn.Parameter(B, requires_grad=trainable)
        if config.init_name == "mica":
            inits.start(self, name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        take_kwargs(kwargs)  # dropped: no variant of an embedding takes keywords
        if adapter_names.__class__ is TokenNames:
            return adapter_names.over(self.forward, x, *args, **kwargs)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self._disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged:
            return y
        dtype = y.dtype
        if adapter_names is None:
            for name in self.active_adapters:
                if name not in self.lora_embedding_A:
                    continue
                variant = self.lora_variant.get(name)
                if variant is None:
                    y = y + self._update(name, x, y)
                else:
                    y = variant.update(self, name, x, y)
            return y.to(dtype)
        names = AdapterNames.of(adapter_names)
        for name, rows in zip(names.order, names.samples.rows(x.device), strict=True):
            if rows is None or name not in self.lora_embedding_A:
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                y = y.index_add(0, rows, self._update(name, x[rows], y).to(dtype))
            else:
                y = y.index_copy(0, rows, variant.update(self, name, x[rows], y[rows]).to(dtype))
        return y

    def _update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        A, B = self._weights(name)
        rows = F.embedding(
            x,
            A.T,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        update = (rows @ B.T) * self.scaling[name]
        scale = getattr(base, "embed_scale", None)  # Gemma's embedding scales in its forward
        if scale is None:
            return update
        return update * (scale.to(update.dtype) if isinstance(scale, Tensor) else scale)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, V], B [D, r]) as a call computes with them."""
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter].T, self.lora_embedding_B[adapter].T

    def decline_reason(self) -> str | None:
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        if not any(n in self.lora_embedding_A for n in self.active_adapters):
            return "no active adapter has weights here"
        if (of_variant := self._variant_reason()) is not None:
            return of_variant
        return "an embedding gathers r numbers a token; there is no product to fuse"

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
