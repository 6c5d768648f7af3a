"""LoRA on ``nn.Linear`` and transformers' ``Conv1D``: the fused call, and when there is none."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module
from torch.nn.parameter import Parameter

from ...ops.lora import lora_linear
from .base import NOTHING, LoraLayer
from .config import LoraConfig

# torch's own dicts of global hooks; a call that skips a module's __call__ must not skip these
_GLOBAL_HOOKS = (_nn_module._global_forward_hooks, _nn_module._global_forward_pre_hooks)


@functools.cache
def weight_layout(base_cls: Any) -> bool | None:
    """False when the class computes x Wᵀ with W [N, K], True with W [K, N], None when that is not
    known."""
    forward = base_cls.forward
    if forward is nn.Linear.forward:
        return False
    if base_cls.__name__ == "Conv1D" and base_cls.__module__ == "transformers.pytorch_utils":
        return True
    return None


def _hook_dicts(module: nn.Module) -> tuple[Any, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return any(_hook_dicts(module)) or "forward" in module.__dict__


class _Plan:
    """Where a layer with one active adapter finds what it computes with: dicts that live as long as
    their modules. Made again when a module was replaced or another adapter became active."""

    name: str
    active: Any
    base: nn.Module
    a: nn.Module
    b: nn.Module
    a_store: Any
    b_store: Any
    drop_store: Any
    kind: type
    drop: Any  # nn.Dropout or nn.Identity
    drops: bool
    base_params: dict[str, Any]
    a_params: dict[str, Any]
    b_params: dict[str, Any]
    scaling: dict[str, float]
    hooks: tuple[Any, ...]
    transposed: bool

    @classmethod
    def of(cls, layer: Linear) -> _Plan | None:
        """The plan of a layer, or None when its calls cannot be fused whatever its weights are."""
        active = layer.__dict__["_active_adapter"]
        names = layer.active_adapters
        base: Any = layer.base_layer
        transposed = weight_layout(base.__class__)
        if len(names) != 1 or names[0] not in layer.lora_A or transposed is None:
            return None
        plan = cls()
        plan.name, plan.active, plan.base, plan.transposed = names[0], active, base, transposed
        plan.a_store, plan.b_store = layer.lora_A._modules, layer.lora_B._modules
        plan.a, plan.b = layer.lora_A[plan.name], layer.lora_B[plan.name]
        plan.kind = type(base)
        plan.drop_store = layer.lora_dropout._modules
        plan.drop = plan.drop_store[plan.name]
        plan.drops = type(plan.drop) is nn.Dropout
        if type(plan.a) is not nn.Linear or type(plan.b) is not nn.Linear:
            return None
        if not plan.drops and type(plan.drop) is not nn.Identity:
            return None
        if plan.b._parameters.get("bias") is not None or "bias" not in base._parameters:
            return None
        plan.base_params, plan.a_params, plan.b_params = (
            base._parameters,
            plan.a._parameters,
            plan.b._parameters,
        )
        plan.scaling = layer.scaling
        modules = (base, plan.a, plan.b, plan.drop)
        if any("forward" in m.__dict__ for m in modules):
            return None
        plan.hooks = _GLOBAL_HOOKS + tuple(hooks for m in modules for hooks in _hook_dicts(m))
        return plan

    def holds(self, state: dict[str, Any]) -> bool:
        """Whether the layer with this ``__dict__`` still has the modules that the plan was made
        for."""
        name = self.name
        return (
            state["_active_adapter"] is self.active
            and state["_modules"]["base_layer"] is self.base
            and self.a_store.get(name) is self.a
            and self.b_store.get(name) is self.b
            and self.drop_store.get(name) is self.drop
            and self.base.__class__ is self.kind  # a parametrization changes the class in place
            and "forward" not in self.base.__dict__
            and "forward" not in self.a.__dict__
            and "forward" not in self.b.__dict__
            and "forward" not in self.drop.__dict__
        )


def bare_linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    """An ``nn.Linear`` around a given weight [out, in], without drawing one that would be thrown
    away."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.__dict__["out_features"], linear.__dict__["in_features"] = weight.shape
    linear._parameters["weight"] = Parameter(weight, requires_grad=trainable)
    linear._parameters["bias"] = None if bias is None else Parameter(bias, requires_grad=trainable)
    return linear


class Linear(nn.Module, LoraLayer):
    """A frozen linear layer with low-rank updates: Y = base(X) + Σ scaling · B A drop(X).

    One active adapter on a plain weight runs as one operation
    (:func:`peftkern.ops.lora.lora_linear`); anything else calls ``base_layer`` and adds the
    updates, and :meth:`decline_reason` says why.
    """

    # attributes of PEFT's layers that this kind does not fill
    lora_embedding_A = lora_embedding_B = lora_magnitude_vector = NOTHING
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    _plan: _Plan | None

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False) -> None:
        super().__init__()
        self._init_lora(base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        self.fan_in_fan_out = fan_in_fan_out

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        A = torch.empty((r, self.in_features), **place)
        B = torch.zeros((self.out_features, r), **place)
        bias = torch.zeros(self.out_features, **place) if config.lora_bias else None
        if config.init_lora_weights == "gaussian":
            A.normal_(std=1 / r)
        else:  # nn.Linear's own default, as in PEFT; drawn once, on the device
            bound = 1 / math.sqrt(self.in_features)
            A.uniform_(-bound, bound)
            if config.init_lora_weights is False:
                B.uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r))
                if bias is not None:
                    bias.uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r))
        self.lora_A._modules[name] = bare_linear(A, None, trainable)
        self.lora_B._modules[name] = bare_linear(B, bias, trainable)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # This runs hundreds of times a token. The plan holds *where* weights, scaling and hooks
        # live, never the weights: replaced tensors, changed scalings and new hooks are seen at the
        # next call. Keep in step with `decline_reason`, which says the same in words.
        state = self.__dict__
        plan = state["_plan"]
        if plan is None or not plan.holds(state):
            plan = state["_plan"] = _Plan.of(self)
        if (
            plan is None
            or args
            or kwargs
            or state["_disable_adapters"]
            or state["merged_adapters"]
            or any(plan.hooks)
            or torch.compiler.is_compiling()
        ):
            return self._forward_general(x, *args, **kwargs)
        params = plan.base_params
        weight, A, B = (
            params.get("weight"),
            plan.a_params.get("weight"),
            plan.b_params.get("weight"),
        )
        if (
            weight.__class__ is not Parameter
            or A.__class__ is not Parameter
            or B.__class__ is not Parameter
            or weight.is_meta
            or A.is_meta
        ):
            return self._forward_general(x)
        dtype, low = weight.dtype, A.dtype
        if x.dtype is not dtype or low is not dtype or B.dtype is not dtype:
            if not _dtypes_fit(x, dtype, low, B.dtype):
                return self._forward_general(x)
        p = plan.drop.p if plan.drops and plan.drop.training else 0.0
        if p >= 1.0:  # drops everything, which no factor 1 / (1 - p) expresses
            return self._forward_general(x)
        return lora_linear(
            x, weight, params["bias"], A, B, plan.scaling[plan.name], p, plan.transposed
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # a copy has its own modules

    def _forward_general(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Any base layer, any adapters: the base's own call, then each update on top."""
        adapter_names = kwargs.pop("adapter_names", None)
        if not torch.compiler.is_compiling():
            self._note_decline()
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        y = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged:
            return y
        dtype = y.dtype
        if adapter_names is not None:
            return self._add_mixed(x, y, adapter_names).to(dtype)
        for name in self.active_adapters:
            if name in self.lora_A:
                y = y + self._update(name, x)
        return y.to(dtype)

    def _update(self, name: str, x: Tensor) -> Tensor:
        A: Any = self.lora_A[name]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.weight.dtype)
        return self.lora_B[name](A(self.lora_dropout[name](x))) * self.scaling[name]

    def _add_mixed(self, x: Tensor, y: Tensor, adapter_names: list[str]) -> Tensor:
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(adapter_names):
            if name in self.lora_A:
                rows.setdefault(name, []).append(i)
        for name, index in rows.items():
            where = torch.tensor(index, device=y.device)
            y = y.index_add(0, where, self._update(name, x[where]).to(y.dtype))
        return y

    def decline_reason(self) -> str | None:
        active = [n for n in self.active_adapters if n in self.lora_A]
        base: Any = self.base_layer
        weight = base._parameters.get("weight")
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        if not active:
            return "no active adapter has weights here"
        if len(self.active_adapters) > 1:
            return f"several adapters are active: {', '.join(self.active_adapters)}"
        if weight_layout(base.__class__) is None:
            return f"base layer {type(base).__name__} computes its product itself"
        A: Any = self.lora_A[active[0]]
        B: Any = self.lora_B[active[0]]
        for what, module in (("base layer", base), ("lora_A", A), ("lora_B", B)):
            if type(module.__dict__["_parameters"].get("weight")) is not Parameter:
                found = type(getattr(module, "weight", None)).__name__
                return f"the weight of {what} is a {found}, not a plain Parameter"
            if is_hooked(module):
                return f"{what} has hooks or an overridden forward"
        if any(_GLOBAL_HOOKS):
            return "torch has global module hooks"
        if B._parameters.get("bias") is not None:
            return "lora_bias"
        if weight.is_meta or A.weight.is_meta:
            return "a weight is on the meta device (offloaded or not loaded yet)"
        dtype = weight.dtype
        if not weight.is_floating_point() or A.weight.dtype not in (dtype, torch.float32):
            return f"dtypes: base {dtype}, adapter {A.weight.dtype}"
        if type(self.lora_dropout[active[0]]) not in (nn.Dropout, nn.Identity):
            return f"dropout is a {type(self.lora_dropout[active[0]]).__name__}"
        if is_hooked(self.lora_dropout[active[0]]):
            return "lora_dropout has hooks"
        return None

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _dtypes_fit(x: Tensor, dtype: torch.dtype, low: torch.dtype, low_b: torch.dtype) -> bool:
    """Whether the fused operation takes x under a weight of ``dtype`` with adapters of ``low``."""
    if low_b != low or not dtype.is_floating_point:
        return False
    if x.dtype == dtype:
        return low == dtype or low == torch.float32
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
