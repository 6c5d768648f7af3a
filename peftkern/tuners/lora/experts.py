"""A module of transformers' experts interface as the arguments of ``ops.lora_experts``.

``transformers.integrations.use_experts_implementation`` makes a class of experts compute, whichever
implementation its configuration names,

    y_t = Σ_j weights[t, j] · norm(down_e(gate(up_e(x_t))))        e = index[t, j]

with weights in 3-D parameters and with flags that say how they lie. Nothing is kept between calls:
everything is read from the module as it is then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ...ops.bases.experts import BaseExperts, reader_of
from ...ops.experts.parts import ExpertLinear, Gate
from ...utils.private import (
    EXPERTS_GATE,
    GLOBAL_HOOKS,
    ExpertsForm,
    experts_form,
    experts_have_sentinels,
    experts_implementation,
    in_transform,
)
from .experts_gate import gate_of
from .offload import is_only_placed
from .plan import is_hooked

# {(forward, gate) of a class: its form}; by these, as each parametrization makes another class
_forms: dict[tuple[Any, Any], ExpertsForm | None] = {}


class Mixture(NamedTuple):
    """A mixture's own parts, without adapters."""

    up: ExpertLinear
    down: ExpertLinear
    gate: Gate
    norm: Callable[[Tensor], Tensor] | None
    sentinels: bool


def form_of(cls: Any) -> ExpertsForm | None:
    """What the experts interface has made of a class; None for a class outside of it."""
    key = cls.forward, getattr(cls, EXPERTS_GATE, None)
    try:
        return _forms[key]
    except KeyError:
        form = _forms[key] = experts_form(cls)
        return form


def parameters_of(module: Any) -> tuple[str, str]:
    """The names of the two parameters that hold the experts' linears."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def shape_of(module: Any, parameter: str) -> Any:
    """The shape [E, N, K] of a parameter of quantised experts as numbers; None for any other."""
    reader = reader_of(module)
    if reader is None or parameter not in parameters_of(module):
        return None
    return reader.shape_of(module, parameter)


def why_never(module: Any, parameter: str) -> str | None:
    """The reason that no call of the module computes with this parameter as one operation.

    It depends on the class and the names alone; None when the operation may run.
    """
    if form_of(module.__class__) is None and reader_of(module) is None:
        return _outside(module)
    if parameter not in parameters_of(module):
        return f"`{parameter}` is not the weight of a linear of the experts"
    return None


def _outside(module: Any) -> str:
    return f"{type(module).__name__} is not a class of transformers' experts interface"


def mixture_of(
    module: Any, away: bool = False, dtype: torch.dtype = torch.float32
) -> Mixture | str:
    """The parts of a module of experts; or the reason, in words, that it must run by itself.

    ``away``: what accelerate's hooks do in each call is taken as done. ``dtype``: the activations',
    in which quantised experts compute.
    """
    if (reader := reader_of(module)) is not None:
        return _packed_mixture(module, reader, dtype)
    form = form_of(module.__class__)
    if form is None:
        return _outside(module)
    state = module.__dict__
    placed = away and is_only_placed(module)
    if is_hooked(module) and not placed:
        return "the experts have hooks or an overridden forward"
    if any(GLOBAL_HOOKS):
        return "torch has global module hooks"
    if (reason := _foreign(form, experts_implementation(module))) is not None:
        return reason
    own = state["_parameters"]
    has_bias = module.has_bias
    parts: list[ExpertLinear] = []
    for name in parameters_of(module):
        weight, bias = own.get(name), own.get(f"{name}_bias") if has_bias else None
        if (reason := _unfit(module, name, weight, 3, placed)) is not None:
            return reason
        of = f"{name}_bias"
        if has_bias and (reason := _unfit(module, of, bias, 2, placed)) is not None:
            return reason
        if parts and weight.dtype is not parts[0].weight.dtype:
            return f"dtypes: {parts[0].weight.dtype} and {weight.dtype}"
        if bias is not None and bias.dtype is not weight.dtype:
            return f"dtypes: weights {weight.dtype}, biases {bias.dtype}"
        parts.append(ExpertLinear(weight.transpose(1, 2) if module.is_transposed else weight, bias))
    for name, child in state["_modules"].items():
        if child is not None and (reason := _alive(name, child, away)) is not None:
            return reason
    return Mixture(
        parts[0],
        parts[1],
        gate_of(module, form),
        module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        experts_have_sentinels(module),
    )


def _packed_mixture(module: Any, reader: Any, dtype: torch.dtype) -> Mixture | str:
    """:func:`mixture_of` for a module of quantised experts."""
    if is_hooked(module):
        return "the experts have hooks or an overridden forward"
    if any(GLOBAL_HOOKS):
        return "torch has global module hooks"
    found = reader.read(module)
    if isinstance(found, str):
        return found
    biases = [None if b is None else b.to(dtype) for b in (found.up_bias, found.down_bias)]
    up, down = (
        ExpertLinear(BaseExperts(packed, dtype), bias)
        for packed, bias in zip((found.up, found.down), biases, strict=True)
    )
    return Mixture(up, down, Gate(*found.gate), None, experts_have_sentinels(module))


def _foreign(form: ExpertsForm, name: Any) -> str | None:
    """The reason that an implementation is left to itself; None for those that are replaced."""
    if name is None or name == "eager":
        return None
    if name not in form.known:
        return f"the experts implementation is {name!r}"
    if form.table.get(name) is not form.known[name]:
        return f"the experts implementation {name!r} is not transformers' own"
    return None


def _unfit(module: Any, name: str, tensor: Any, dim: int, placed: bool) -> str | None:
    """The reason that an operation cannot read a parameter of the experts, or None."""
    # `__class__` is another in graphs of torch 2.11
    if type(tensor) is not Parameter and not is_traced_value(tensor):
        if name in module.__dict__.get("_modules", {}).get("parametrizations", ()):
            return f"{name} is parametrized"
        return f"{name} is a {type(tensor).__name__}, not a plain Parameter"
    if tensor.is_meta and not placed:
        return f"{name} is on the meta device (offloaded or not loaded yet)"
    if tensor.dim() != dim:
        return f"{name} has {tensor.dim()} dimensions (its shape is {list(tensor.shape)})"
    if tensor.requires_grad:
        return f"{name} requires a gradient"
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        return f"{name} is {tensor.dtype}"
    return None


def _alive(name: str, child: Any, away: bool) -> str | None:
    """The reason that a submodule (activation, norm) must be called by its module, or None.

    An operation makes the gate again in its backward, where a hook would act a second time, and
    knows of no gradient but those of the adapters, the tokens and the routing weights.
    """
    placed = away and is_only_placed(child)
    called_apart = is_hooked(child) and not placed
    if called_apart or (child._modules and any(map(is_hooked, child.modules()))):
        return f"{name} has hooks or an overridden forward"
    found = child.parameters() if child._modules else child._parameters.values()
    for parameter in found:
        if parameter is not None and (
            parameter.requires_grad or (parameter.is_meta and not placed)
        ):
            return f"a parameter of {name} requires a gradient or is on the meta device"
    return None


def is_traced_value(tensor: Any) -> bool:
    """True for what a transform of torch.func has put in a parameter's place."""
    return type(tensor) is Tensor and in_transform()


def describe_implementation(module: Any) -> str:
    """Words for the implementation that the operation stands in for."""
    if reader_of(module) is not None:
        return f"in place of {type(module).__name__}'s own"
    return f"in place of {experts_implementation(module) or 'eager'!r}"
