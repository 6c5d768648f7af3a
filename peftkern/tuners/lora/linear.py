"""LoRA on ``nn.Linear`` and transformers' ``Conv1D``: the fused call, and the general forward."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...configs.lora import LoraConfig
from ...ops import autocast
from ...ops import backend as _backend
from ...ops.bases.formats import reader_of
from ...ops.bases.linear import frozen_linear
from ...ops.library import traced_lora_linear, why_formula
from ...ops.lora import fused_linear
from ...ops.projection import Projection
from ...ops.tracing import is_compiling, is_tracing
from ...utils.gathering import held_in
from ...utils.handing import HERE, TokenNames, hand_over
from ...utils.private import (
    GLOBAL_HOOKS,
    HookCounter,
    forward_level,
    in_transform,
    jit_is_tracing,
    transforms_active,
)
from ...utils.zero3 import gather_for, is_gathered_alone
from . import inits
from .base import NOTHING, LoraLayer
from .group import Group
from .inits.random import of_linear, placed
from .plan import (
    Plan,
    base_reason,
    base_weight,
    calls_more,
    has_whole_weight,
    is_hooked,
    weight_layout,
)
from .ran import FUSED
from .row_adapters import IN_TRANSFORM, AdapterNames, Held, forward_mixed
from .variant import make_ready, take_kwargs

# not a reason under a compiler: a traced call is one operation with such a scaling too
SCALING_IS_A_TENSOR = "the scaling is a tensor (prepared for hot-swapping into a compiled model)"


def bare_linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    """An ``nn.Linear`` around a given weight [out, in]; draws no random numbers."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.__dict__["out_features"], linear.__dict__["in_features"] = weight.shape
    linear._parameters["weight"] = Parameter(weight, requires_grad=trainable)
    linear._parameters["bias"] = None if bias is None else Parameter(bias, requires_grad=trainable)
    return linear


class Linear(nn.Module, LoraLayer):
    """A frozen linear layer with low-rank updates: Y = base(X) + Σ scaling · B A drop(X).

    One active adapter on a plain weight runs as one operation
    (:func:`peftkern.ops.lora.lora_linear`). Other calls run ``base_layer`` and add the updates;
    :meth:`decline_reason` says why. X is [..., K], Y [..., N].
    """

    layer_kind = "linear"
    # attributes of PEFT's layers that are always empty here
    lora_embedding_A = lora_embedding_B = NOTHING
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    _plan: Plan | None
    _group: Group | None
    _held: Held | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: LoraConfig | None = None,
        r: int = 0,
        lora_alpha: float = 1,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_lora(base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        self.fan_in_fan_out = fan_in_fan_out or (config is not None and config.fan_in_fan_out)
        self._first_adapter(adapter_name, config, r, lora_alpha, kwargs)

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        K, N, with_bias = self.in_features, self.out_features, config.lora_bias
        bias: Tensor | None
        if place["device"] == "meta":
            A, B = torch.empty((r, K), **place), torch.empty((N, r), **place)
            bias = torch.empty(N, **place) if with_bias else None
        else:
            base = self._base_dtype()
            A, B, bias = of_linear(r, K, N, inits.drawn_as(self, config), with_bias)
            A, B = placed(A, base, place), placed(B, base, place)
            bias = None if bias is None else placed(bias, base, place)
        self.lora_A._modules[name] = bare_linear(A, None, trainable)
        self.lora_B._modules[name] = bare_linear(B, bias, trainable)
        if isinstance(config.init_name, str):
            inits.start(self, name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        if is_compiling():
            traced = None if args or kwargs else self.traced_call(x)
            if traced is None:
                return self._forward_general(x, *args, **kwargs)
            return traced_lora_linear(x, traced)
        call = None if args or kwargs else self.fused_call(x)
        if call is None:
            return self._forward_general(x, *args, **kwargs)
        weight, bias, A, B, scale, p, transposed = call  # starring it costs more
        group = self.__dict__["_group"]
        if group is not None and not group.off:
            y = None
            # without gradients a group trains only with dropout: the first pass of a reentrant
            # checkpoint must draw its masks in the same order as the second
            if p > 0.0 or torch.is_grad_enabled():
                y = group.output(self, x, Projection(*call))
            elif _backend.active.group_rows and not self.training:  # else it may be such a pass
                y = group.few_output(self, x, Projection(*call))
            if y is not None:
                return y
        return fused_linear(x, weight, bias, A, B, scale, p, transposed)

    def fused_call(self, x: Tensor) -> tuple[Any, ...] | None:
        """The fields of a :class:`Projection` of x [..., K]; None when it cannot be fused.

        They are a plain tuple, which costs less to make. :meth:`decline_reason` gives the reason
        in words and must test the same conditions.
        """
        # This runs hundreds of times for each token. The plan holds *where* weights, scaling and
        # hooks are, never the weights, so that the next call sees any that were replaced.
        state = self.__dict__
        plan = state["_plan"]
        if plan is None or not plan.holds(state):
            plan = state["_plan"] = Plan.of(self)
        if (
            plan is None
            or state["_disable_adapters"]
            or state["merged_adapters"]
            or (HookCounter.next_id != plan.hooks_seen and plan.is_hooked())
            or transforms_active()
            or forward_level() >= 0
            or jit_is_tracing()  # takes a third of the time of torch.jit.is_tracing
            or (plan.divided and not plan.gather(self))
        ):
            return None
        if plan.quantised:
            return self._quantised_call(plan, x)
        params = plan.base_params
        weight, bias = params.get("weight"), params.get("bias")
        A, B = plan.a_params.get("weight"), plan.b_params.get("weight")
        if (
            weight.__class__ is not Parameter
            or A.__class__ is not Parameter
            or B.__class__ is not Parameter
        ):
            found = plan.gathered()
            if found is None:
                return None
            weight, bias, A, B = found
        if weight.is_meta or A.is_meta:
            return None
        dtype, low = weight.dtype, A.dtype
        if x.dtype is not dtype or low is not dtype or B.dtype is not dtype:
            if not _dtypes_fit(x, dtype, low, B.dtype):
                return None
        p = plan.drop.p if plan.drops and plan.drop.training else 0.0
        if p >= 1.0:  # everything is dropped, and 1 / (1 - p) is not defined
            return None
        scale = state["scaling"][plan.name]
        if scale.__class__ is Tensor:
            return None
        state["_ran"] = FUSED
        return weight, bias, A, B, scale, p, plan.transposed

    def _quantised_call(self, plan: Plan, x: Tensor) -> tuple[Any, ...] | None:
        """The rest of :meth:`fused_call` for a base layer with a quantised weight."""
        A, B = plan.a_params.get("weight"), plan.b_params.get("weight")
        if A.__class__ is not Parameter or B.__class__ is not Parameter:
            found = plan.gathered()
            if found is None:
                return None
            _, _, A, B = found
        if A.is_meta:
            return None
        p = plan.drop.p if plan.drops and plan.drop.training else 0.0
        scale = self.__dict__["scaling"][plan.name]
        if p >= 1.0 or scale.__class__ is Tensor or not _dtypes_fit(x, x.dtype, A.dtype, B.dtype):
            return None
        base = base_weight(plan.base, x)
        if base is None:
            return None
        self.__dict__["_ran"] = FUSED
        return *base, A, B, scale, p, False

    def traced_call(self, x: Tensor) -> Projection | None:
        """:meth:`fused_call` for a compiler; None when the compiler gets the plain formula.

        It writes nothing and reads everything from the modules, so that the compiler can guard what
        the result depends on.
        """
        if self.decline_reason() not in (None, SCALING_IS_A_TENSOR):
            return None
        if reader_of(self.base_layer) is not None:  # compilers get the base layer and the update
            return None
        name = self.active_adapters[0]
        call = self.product_call(x, name)
        if call is None or why_formula(x, call.A) is not None:
            return None
        return call

    def product_call(self, x: Tensor, name: str) -> Projection | None:
        """The :class:`Projection` of ``x`` with this adapter, or None.

        :meth:`product_reason` must be None for the adapter.
        """
        if in_transform() or is_tracing():
            return None
        base: Any = self.base_layer
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        if is_gathered_alone(self):
            held = [p for module in (base, a, b) for p in module.parameters()]
            if is_compiling() or not gather_for(self, held):
                return None
        drop: Any = self.lora_dropout[name]
        p = drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0
        if (
            p >= 1.0
            or not x.is_floating_point()
            # product_reason tests for replaced forwards too, but compilers set no guard for its
            # test; with this one they notice a forward that is replaced later
            or not all(isinstance(m.forward, MethodType) for m in (base, a, b, drop))
        ):
            return None
        if reader_of(base) is not None:
            found, layout = base_weight(base, x), False
            if found is None:
                return None
            weight, bias = found
        else:
            weight, bias = base.weight, base.bias
            layout = bool(weight_layout(base.__class__))  # known, or there is a product_reason
        if not _dtypes_fit(x, weight.dtype, a.weight.dtype, b.weight.dtype):
            return None
        scale: Any = self.scaling[name]
        B = b.weight
        if isinstance(scale, Tensor):  # the operation takes a number
            B, scale = B * scale, 1.0
        return Projection(weight, bias, a.weight, B, scale, p, layout)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_plan": None,
            "_ran": None,
            "_held": None,
        }  # a copy has other modules

    def delete_adapter(self, adapter_name: str) -> None:
        self._held = None  # it holds the adapter's modules
        super().delete_adapter(adapter_name)

    def _forward_general(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output for any base layer and adapters: the base's own call, then each update."""
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = take_kwargs(kwargs)
        if self.lora_variant:
            make_ready(self)
        if adapter_names.__class__ is TokenNames:
            return adapter_names.over(self._forward_general, x, *args, **kwargs, **variant_kwargs)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
            names = AdapterNames.of(adapter_names)
            return forward_mixed(self, x, names, args, kwargs, variant_kwargs)
        if not torch.compiler.is_compiling():
            if self.lora_variant and not (args or kwargs or variant_kwargs):
                y = self._variant_operation(x)
                if y is not None:
                    return y
            self._note_decline()
        if self._disable_adapters and self.merged:
            self.unmerge()
        y = self._base_output(x, *args, **kwargs)
        if self._disable_adapters or self.merged:
            return y
        dtype = y.dtype
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                y = y + self._update(name, x)
            else:
                y = variant.update(self, name, x, y, **variant_kwargs)
        return y.to(dtype)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output; of a quantised one that can be read without its own forward."""
        base: Any = self.base_layer
        if reader_of(base) is not None and not (
            args or kwargs or is_compiling() or is_tracing() or is_hooked(base)
            or any(GLOBAL_HOOKS)
        ):  # fmt: skip
            found = base_weight(base, x)
            # transforms take no autograd function, which most owners' forwards are
            if found is not None and (found[0].packed.is_linear or not in_transform()):
                return frozen_linear(x, *found)
        y: Tensor = base(x, *args, **kwargs)
        return y

    def _update(self, name: str, x: Tensor) -> Tensor:
        A: Any = self.lora_A[name]
        if not autocast.is_on(x):
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.lora_B[name](A(self.lora_dropout[name](x))) * self.scaling[name]

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        variant = self.lora_variant.get(adapter)
        if variant is None:
            B: Any = self.lora_B[adapter].weight
            A: Any = self.lora_A[adapter].weight
        else:
            B, A = variant.factors(self, adapter)
        return (A.T, B.T) if self.fan_in_fan_out else (B, A)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True when the adapter's update can be written as one of plain LoRA."""
        variant = self.lora_variant.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()

    def decline_reason(self) -> str | None:
        active = [n for n in self.active_adapters if n in self.lora_A]
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        if not active:
            return "no active adapter has weights here"
        if len(self.active_adapters) > 1:
            return f"several adapters are active: {', '.join(self.active_adapters)}"
        if (of_variant := self._variant_reason()) is not None:
            return of_variant
        if torch.is_tensor(self.scaling[active[0]]):
            return self.product_reason(active[0]) or SCALING_IS_A_TENSOR
        return self.product_reason(active[0])

    def product_reason(self, name: str) -> str | None:
        """The reason that base layer and adapter cannot be one operation; None when they can."""
        base: Any = self.base_layer
        weight = held_in(base)
        if is_tracing():
            return "torch.jit.trace records the plain formula"
        if in_transform():
            return IN_TRANSFORM
        if (of_base := base_reason(base)) is not None:
            return of_base
        quantised = reader_of(base) is not None
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        for what, module in (("lora_A", A), ("lora_B", B)):
            if type(module) is not nn.Linear:
                return f"{what} is a {type(module).__name__}, not an nn.Linear"
        for what, module in (("base layer", base), ("lora_A", A), ("lora_B", B)):
            plain = quantised and module is base
            if not plain and not has_whole_weight(module):
                found = type(getattr(module, "weight", None)).__name__
                return f"the weight of {what} is a {found}, not a plain Parameter"
            if calls_more(module):
                return f"{what} has hooks or an overridden forward"
        if any(GLOBAL_HOOKS):
            return "torch has global module hooks"
        if held_in(B, "bias") is not None:
            return "lora_bias"
        if A.weight.is_meta or (not quantised and weight.is_meta):
            return "a weight is on the meta device (offloaded or not loaded yet)"
        low = A.weight.dtype
        if not quantised and (
            not weight.is_floating_point() or low not in (weight.dtype, torch.float32)
        ):
            return f"dtypes: base {weight.dtype}, adapter {low}"
        if B.weight.dtype != low:
            return f"dtypes: lora_A {low}, lora_B {B.weight.dtype}"
        if type(self.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return f"dropout is a {type(self.lora_dropout[name]).__name__}"
        if calls_more(self.lora_dropout[name]):
            return "lora_dropout has hooks"
        return None

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _dtypes_fit(x: Tensor, dtype: torch.dtype, low: torch.dtype, low_b: torch.dtype) -> bool:
    """True when the fused operation takes x with W of ``dtype``, A of ``low``, B of ``low_b``."""
    if low_b != low or not dtype.is_floating_point:
        return False
    if x.dtype == dtype:
        return low == dtype or low == torch.float32
    return autocast.is_on(x) and x.dtype != torch.float64
