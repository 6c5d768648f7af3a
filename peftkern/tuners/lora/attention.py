"""LoRA on ``nn.MultiheadAttention``: the update is added to the weights for each call.

torch's module passes its weights to one function, so there is no call of a linear layer to extend.
Here the call runs on a stand-in for the module, which holds the adapted weights. The module itself
is never changed, so that a state dict, another thread or a recomputation sees the base weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...configs.lora import LoraConfig
from ...utils.handing import HERE, hand_over
from .base import NOTHING, LoraLayer
from .linear import Linear
from .variant import table_of, take_kwargs, variant_class


class _Unfused(Tensor):
    """A tensor class that torch's fused encoder layer declines, as that would ignore adapters."""


class _OutProj(Linear):
    """The output projection within a :class:`MultiheadAttention`, which reads its weights."""

    def _get_name(self) -> str:
        return "Linear"  # the name that HF PEFT prints

    def decline_reason(self) -> str | None:
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        return "the nn.MultiheadAttention around it reads its weights, and adds the update to them"

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The adapter's factors for merging, doubled as in :meth:`MultiheadAttention.forward`."""
        left, right = super()._factors(adapter)
        return 2 * left, right

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update [N, K], not doubled, as HF PEFT returns it."""
        return super().get_delta_weight(adapter) / 2


class _Weights:
    """A stand-in for attention's output projection: weight, bias and a call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def product(layer: Any, adapter: str) -> Tensor:
    """The update scaling · B A, [N, K], in the dtype of B.

    On a CPU float16 and bfloat16 are multiplied in float32, as HF PEFT does.
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dtype = b.dtype
    if b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return ((b @ a) * layer.scaling[adapter]).to(dtype)


class MultiheadAttention(nn.Module, LoraLayer):
    """A frozen ``nn.MultiheadAttention`` with low-rank updates of both of its projections.

    They are the input projection [3 * embed_dim, embed_dim] and the output projection. The adapter
    of the output projection is in ``base_layer.out_proj``, a LoRA linear layer. Its update counts
    twice: HF PEFT adds it once in this layer and once more in the nested one, and files were
    trained with that. Its gradient counts once, as in HF PEFT. ``lora_dropout`` has no effect, and
    ``lora_bias`` has one only on the output projection.

    Raises:
        ValueError: query, key and value have different sizes, and so three separate weights.
    """

    layer_kind = "attention"
    # attributes of PEFT's layers that are always empty here
    lora_embedding_A = lora_embedding_B = NOTHING
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    _make_weights: Any = Linear._make_weights

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
        base: Any = base_layer
        check_attention(base, config)
        self._init_lora(base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        self.fan_in_fan_out = False
        if not isinstance(base.out_proj, Linear):
            base.out_proj = _OutProj(base.out_proj)
        self._first_adapter(adapter_name, config, r, lora_alpha, kwargs)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        autocast_dtype: bool = True,
        meta: bool = False,
        trainable: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to both projections; see :meth:`LoraLayer.update_layer`."""
        check_attention(self.get_base_layer(), config)
        out_proj = self._out_proj
        updates = [super().update_layer, out_proj.update_layer]
        if not out_proj.lora_A:
            out_proj._active_adapter = self._active_adapter
            updates.insert(0, out_proj.update_layer)  # HF PEFT draws the first adapter twice
        for update in updates:
            update(adapter_name, r, lora_alpha, config, autocast_dtype, meta, trainable)
        self.lora_bias[adapter_name] = False  # the input projection has no lora_bias

    @property
    def _out_proj(self) -> Any:
        return self.base_layer.out_proj

    # ---------------------------------------------------------------- what models read of the base

    def _of_base(name: str) -> Any:  # type: ignore[misc]
        return property(lambda self: getattr(self.get_base_layer(), name))

    embed_dim = _of_base("embed_dim")
    kdim = _of_base("kdim")
    vdim = _of_base("vdim")
    num_heads = _of_base("num_heads")
    head_dim = _of_base("head_dim")
    dropout = _of_base("dropout")
    batch_first = _of_base("batch_first")
    add_zero_attn = _of_base("add_zero_attn")
    in_proj_bias = _of_base("in_proj_bias")
    bias_k = _of_base("bias_k")
    bias_v = _of_base("bias_v")
    _qkv_same_embed_dim = _of_base("_qkv_same_embed_dim")
    merge_masks = _of_base("merge_masks")

    @property
    def in_proj_weight(self) -> Tensor:
        """The base's weight; as :class:`_Unfused` while an adapter acts.

        torch's fused ``nn.TransformerEncoderLayer`` reads this weight and skips the forward; it
        declines that class.
        """
        weight: Any = self.get_base_layer().in_proj_weight
        acts = not (self._disable_adapters or self.merged or not self._acting())
        return weight.as_subclass(_Unfused) if acts else weight

    @property
    def out_proj(self) -> nn.Module:
        return self._out_proj.get_base_layer()

    # ---------------------------------------------------------------- the call

    def _acting(self) -> list[str]:
        return [n for n in self.active_adapters if n in self.lora_A]

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
            take_kwargs(kwargs)  # dropped: attention has no variants
        if "adapter_names" in kwargs:
            raise TypeError("lora.MultiheadAttention does not support mixed adapter batches.")
        base: Any = self.base_layer
        if self._disable_adapters and self.merged:
            self.unmerge()
        if not (self._disable_adapters or self.merged):
            self._check_out_proj()
            if not torch.compiler.is_compiling():
                self._note_decline()
            base = self._adapted(base) if self._acting() else base
        y, weights = base(query, *args, **kwargs)
        return y.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _check_out_proj(self) -> None:
        out_proj = self._out_proj
        if out_proj.merged or out_proj.active_adapters != self.active_adapters:
            name = type(self.get_base_layer()).__name__
            raise ValueError(
                f"The out_proj layer of {name} has merged layers but {name} itself doesn't; please "
                "ensure that either both or none have merged layers"
            )

    def _adapted(self, base: Any) -> Any:
        """A stand-in for ``base`` with the updates in its weights; all else is shared."""
        out_proj = self._out_proj
        inner = out_proj.get_base_layer()
        weight_in, weight_out = base.in_proj_weight.detach(), inner.weight.detach()
        dtype, bias = weight_out.dtype, inner.bias
        for name in self._acting():
            weight_in = weight_in + product(self, name).to(dtype)
            update = product(out_proj, name)
            weight_out = weight_out + update.to(dtype)
            # a second time, without a gradient: see the docstring of the class
            weight_out = (weight_out + update.detach()).to(dtype)
            if out_proj.lora_bias.get(name):
                if bias is None:
                    raise RuntimeError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has "
                        "no bias."
                    )
                extra = (out_proj.lora_B[name].bias * out_proj.scaling[name]).detach()
                bias = (bias + extra).to(bias.dtype)
        stand_in = object.__new__(type(base))
        stand_in.__dict__.update(base.__dict__)
        # in __dict__ these hide the parameter and the module of the same names
        stand_in.__dict__["in_proj_weight"] = weight_in
        stand_in.__dict__["out_proj"] = _Weights(weight_out, bias)
        return stand_in

    def _restore_weights(self) -> None:
        """Do nothing: HF PEFT's layer has to restore its weights after a call, this one has not."""

    # ---------------------------------------------------------------- merging

    def _merge_target(self) -> tuple[Any, str]:
        return self.get_base_layer(), "in_proj_weight"

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return B.weight, A.weight

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        exact: bool = True,
    ) -> None:
        """Add adapters to the weights of both projections; see :meth:`LoraLayer.merge`."""
        super().merge(safe_merge, adapter_names, exact)
        self._out_proj.merge(safe_merge, adapter_names, exact)

    def unmerge(self) -> None:
        """Take the merged adapters out of both projections."""
        super().unmerge()
        if self._out_proj.merged:
            self._out_proj.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The ``nn.MultiheadAttention`` without LoRA layers; with ``merge``, after merging."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if merge and any(n in self.lora_A and n not in self.merged_adapters for n in names):
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: Any = self.base_layer
        base.out_proj = self.out_proj
        return base

    def decline_reason(self) -> str | None:
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        if not self._acting():
            return "no active adapter has weights here"
        return "nn.MultiheadAttention computes its products itself; each call adds the update to W"

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def check_attention(base: Any, config: LoraConfig | None) -> None:
    """Raise an error, in HF PEFT's words, for an attention or a setting that cannot be adapted."""
    if not base.embed_dim == base.kdim == base.vdim:
        raise ValueError(
            "Only same embed for query/key/value is supported as of now for MultiheadAttention."
        )
    if config is not None:
        kind = MultiheadAttention.layer_kind
        variant_class(table_of(kind), kind, config)
    if not isinstance(base.out_proj, nn.Linear) and not isinstance(base.out_proj, Linear):
        raise TypeError("out_proj must be an instance of nn.Linear for MultiheadAttention.")
