"""``Plan``: the places of the weights, scaling and hooks of a LoRA layer that can be fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...ops.bases.formats import Unusable, as_weight, checked, is_owners_forward, reader_of
from ...ops.bases.weight import BaseWeight
from ...utils.gathering import held_in, is_gathered
from ...utils.private import GLOBAL_HOOKS, HookCounter
from ...utils.zero3 import gather_for, has_only_its_hooks

if TYPE_CHECKING:
    from .linear import Linear


def weight_layout(base_cls: Any) -> bool | None:
    """The layout of a class's weight: False for W [N, K], True for W [K, N], None if unknown."""
    forward = base_cls.forward
    if forward is nn.Linear.forward:
        return False
    if base_cls.__name__ == "Conv1D" and base_cls.__module__ == "transformers.pytorch_utils":
        return True
    return None


def shape_of(module: Any) -> tuple[int, ...]:
    """The shape of a linear module's weight by its own numbers, not those of the weight."""
    if hasattr(module, "nf"):  # transformers' Conv1D
        return module.nx, module.nf
    return module.out_features, module.in_features


def has_whole_weight(module: Any) -> bool:
    """True where the weight is a Parameter, or a whole one that FSDP1 has put in its place."""
    if type(module._parameters.get("weight")) is nn.Parameter:  # nearly always, in every call
        return True
    return is_gathered(held_in(module), shape_of(module))


def hook_dicts(module: nn.Module) -> tuple[Any, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_hooked(module: nn.Module) -> bool:
    """True when a call of the module runs more than its class's forward."""
    return bool(  # a tuple of the four would cost more than the rest of this
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not is_owners_forward(module))
    )


def calls_more(module: nn.Module) -> bool:
    """:func:`is_hooked`, but False for ZeRO-3's hooks where an operation can do without them.

    Of a quantised layer it gathers more than the parameters that are known here.
    """
    quantised = reader_of(module) is not None
    return is_hooked(module) and (quantised or not has_only_its_hooks(module))


def base_weight(base: Any, x: Tensor) -> tuple[BaseWeight, Tensor | None] | None:
    """(weight, bias) of a base layer of a known format, as an operation on x takes them, or None.

    :func:`base_reason` gives the reason in words.

    Raises:
        ValueError: the base layer itself cannot be called with x either, or x is of integers.
    """
    reader = reader_of(base)
    found = None if reader is None else checked(reader, base)
    if found is None or isinstance(found, str):
        if isinstance(found, Unusable) and not x.is_meta:
            raise ValueError(f"a {type(base).__name__} cannot be called: {found}")
        return None
    if not x.is_floating_point():  # bitsandbytes would return memory that nobody wrote
        raise ValueError(
            f"a {type(base).__name__} with a weight in {found.packed.format} takes x of a "
            f"floating-point dtype, given {x.dtype}"
        )
    packed, bias = found
    if packed.why_not_takes(x) is not None:
        return None
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)  # some owners cast theirs for good
    return as_weight(packed, x), bias


def base_reason(base: Any) -> str | None:
    """The reason that a base layer's product cannot be a part of an operation, or None."""
    if (reader := reader_of(base)) is not None:
        found = checked(reader, base)
        return found if isinstance(found, str) else None
    if weight_layout(base.__class__) is None:
        return f"base layer {type(base).__name__} computes its product itself"
    return None


class _Known:
    """Stands for the ``__dict__`` of a module whose ``forward`` in it is an owner's.

    ``"forward" in`` it is False while that is the same.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.forward = state, state["forward"]

    def __contains__(self, name: str) -> bool:
        return self.state.get(name) is not self.forward


def _own(module: nn.Module) -> Any:
    return _Known(module.__dict__) if is_owners_forward(module) else module.__dict__


class Plan:
    """The dicts in which a layer with one active adapter finds its weights, scaling and hooks.

    The dicts live as long as their modules. A new plan is made when a module was replaced or
    another adapter became active.
    """

    name: str
    base: nn.Module
    a: nn.Module
    b: nn.Module
    a_store: Any
    b_store: Any
    drop_store: Any
    drop: Any  # nn.Dropout or nn.Identity
    drops: bool
    found: tuple[Any, ...]  # the objects that :meth:`holds` compares with the present ones
    own: tuple[Any, Any, Any, Any]  # the modules' __dict__; a "forward" in one replaces its class's
    base_params: dict[str, Any]
    a_params: dict[str, Any]
    b_params: dict[str, Any]
    hooks: tuple[Any, ...]
    hooks_seen: int
    transposed: bool
    quantised: bool  # True: the weight is read by its format
    divided: bool  # True: ZeRO-3 hooks the modules

    @classmethod
    def of(cls, layer: Linear) -> Plan | None:
        """The plan of a layer; None when its calls cannot be fused with any weights."""
        active = layer.__dict__["_active_adapter"]
        names = layer.active_adapters
        base: Any = layer.base_layer
        transposed = weight_layout(base.__class__)
        quantised = reader_of(base) is not None
        if quantised:
            transposed = False
        if len(names) != 1 or names[0] not in layer.lora_A or transposed is None:
            return None
        if names[0] in layer.lora_variant:
            return None
        plan = cls()
        plan.name, plan.base, plan.transposed = names[0], base, transposed
        plan.quantised = quantised
        plan.a_store, plan.b_store = layer.lora_A._modules, layer.lora_B._modules
        plan.a, plan.b = layer.lora_A[plan.name], layer.lora_B[plan.name]
        plan.drop_store = layer.lora_dropout._modules
        plan.drop = plan.drop_store[plan.name]
        plan.drops = type(plan.drop) is nn.Dropout
        if type(plan.a) is not nn.Linear or type(plan.b) is not nn.Linear:
            return None
        if not plan.drops and type(plan.drop) is not nn.Identity:
            return None
        if held_in(plan.b, "bias") is not None:
            return None
        if not quantised and "bias" not in base._parameters and "bias" not in base.__dict__:
            return None
        plan.base_params, plan.a_params, plan.b_params = (
            base._parameters,
            plan.a._parameters,
            plan.b._parameters,
        )
        modules = (base, plan.a, plan.b, plan.drop)
        plan.own = (base.__dict__, plan.a.__dict__, plan.b.__dict__, plan.drop.__dict__)
        if any("forward" in own for own in plan.own):
            plan.own = (_own(base), _own(plan.a), _own(plan.b), _own(plan.drop))
        if any("forward" in own for own in plan.own):
            return None
        stores = (layer.lora_A, layer.lora_B, layer.lora_dropout)
        classes = (base.__class__, nn.Linear, nn.Linear)
        plan.found = (active, base, *stores, plan.a, plan.b, plan.drop, *classes, None)
        plan.hooks_seen, plan.divided = -1, False
        plan.hooks = GLOBAL_HOOKS + tuple(hooks for m in modules for hooks in hook_dicts(m))
        return plan

    def gathered(self) -> tuple[Any, Any, Any, Any] | None:
        """(weight, bias, A, B) where FSDP1 has put views in their place; None if one is no whole.

        Weight and bias are None for a weight that is read by its format.
        """
        modules = (self.a, self.b) if self.quantised else (self.base, self.a, self.b)
        held = [held_in(module) for module in modules]
        if not all(map(is_gathered, held, map(shape_of, modules))):
            return None
        if self.quantised:
            return (None, None, *held)
        return (held[0], held_in(self.base, "bias"), *held[1:])

    def is_hooked(self) -> bool:
        """True when one of the modules has a hook but for ZeRO-3's, or torch has global hooks.

        To be asked when a hook was registered since ``hooks_seen``: every registration takes a new
        number, and reading twenty dicts costs as much as a product of one row.
        """
        number = HookCounter.next_id
        self.divided = False
        if any(self.hooks):
            modules = (self.base, self.a, self.b, self.drop)
            if any(GLOBAL_HOOKS) or any(map(calls_more, modules)):
                return True
            self.divided = True
            # it has put dicts of its own in their place
            params = (self.base._parameters, self.a._parameters, self.b._parameters)
            self.base_params, self.a_params, self.b_params = params
        self.hooks_seen = number
        return False

    def gather(self, layer: nn.Module) -> bool:
        """True when the weights that ZeRO-3 divides are whole in this call of the layer."""
        held = (*self.base_params.values(), self.a_params["weight"], self.b_params["weight"])
        return gather_for(layer, held)

    def holds(self, state: dict[str, Any]) -> bool:
        """True when the layer with this ``__dict__`` still has the plan's modules."""
        name, modules = self.name, state["_modules"]
        base, a, b, drop = self.own
        # two tuples are compared in C, by identity first; single comparisons take 1.5 times as long
        return (
            state["_active_adapter"],
            modules["base_layer"],
            modules["lora_A"],
            modules["lora_B"],
            modules["lora_dropout"],
            self.a_store.get(name),
            self.b_store.get(name),
            self.drop_store.get(name),
            # a parametrization or FSDP changes a module's class in place
            self.base.__class__,
            self.a.__class__,
            self.b.__class__,
            self.b_params.get("bias"),
        ) == self.found and not (
            "forward" in base or "forward" in a or "forward" in b or "forward" in drop
        )
