"""A wrapper of a linear layer's weight as the operation of a LoRA linear.

The weight W [N, K] of ``nn.Linear`` gets factors as a LoRA linear does. In a ``Conv1D`` the
parameter is Wᵀ [K, N], so that the wrapper's ``lora_A`` [r, N] and ``lora_B`` [K, r] stand the
other way round: X (Wᵀ + c B A) is X Wᵀ + c (X B) A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...ops.library import traced_lora_linear, why_formula
from ...ops.lora import lora_linear
from ...ops.projection import Projection
from ...ops.tracing import is_compiling
from ...utils.private import in_transform
from ..base_layer import as_names
from .base import LoraLayer
from .linear import Linear
from .plan import weight_layout
from .row_adapters import IN_TRANSFORM, AdapterNames, forward_mixed


def is_product(module: Any, parameter: str) -> bool:
    """True for the weight of a layer that computes a product with it and nothing else."""
    return parameter == "weight" and weight_layout(module.__class__) is not None


def why_never(module: Any, parameter: str) -> None:
    """None: of a layer for which :func:`is_product` is true, every call may be one operation."""


def why_separate(wrapper: Any, names: Sequence[str]) -> str | None:
    """The reason that the updates of these adapters must be added to the weight, or None."""
    layout = weight_layout(wrapper.base_layer.__class__)
    if layout and len(names) > 1:
        return "several adapters on the weight of a Conv1D"
    for name in names:
        reason = Linear.product_reason(wrapper, name)
        if reason == IN_TRANSFORM and (not layout or name in wrapper.lora_variant):
            continue  # the layer's output and the update, by torch's operations
        if reason is not None:
            return reason
    return None


def run(wrapper: Any, args: Any, kwargs: Any, names: Sequence[str] | None = None) -> Tensor | str:
    """The output of a call of the linear layer; or the reason that W + scaling · B A is needed.

    ``names``: the adapter of each sample of x [samples, ..., K].
    """
    if len(args) != 1 or kwargs:
        return "the layer is called with other arguments"
    x = args[0]
    if names is not None:
        LoraLayer._check_adapter_names(wrapper, x, names)
        rows = AdapterNames.of(names)
        here = [name for name in rows.order if name in wrapper.lora_A]
        if here and weight_layout(wrapper.base_layer.__class__):
            return "the weight is a Conv1D's"
        if (reason := why_separate(wrapper, here)) is not None:
            return reason
        return forward_mixed(wrapper, x, rows, (), {}, {})
    state = wrapper.__dict__
    if state["_disable_adapters"] or state["merged_adapters"]:
        return "adapters are disabled or merged"
    active = as_names(state["_active_adapter"])
    here = [name for name in active if name in wrapper.lora_A]
    if wrapper.lora_variant and any(name in wrapper.lora_variant for name in here):
        return _with_variants(wrapper, x, here)
    if is_compiling():
        call = _traced(wrapper, x, active)
        if call is None:
            return "a compiler traces the plain formula"
        return traced_lora_linear(x, call)
    plan = state["_plan"]
    if plan is not None and active != [plan.name]:  # a list that a caller may have changed
        state["_plan"] = None
    found = Linear.fused_call(wrapper, x)
    if found is not None:
        return lora_linear(x, *turned(found))
    if (reason := why_separate(wrapper, here)) is not None:
        return reason
    if len(here) == 1 and not in_transform():
        return "the dtypes of input, weight and adapter differ"
    return _summed(wrapper, x, here)


def _with_variants(wrapper: Any, x: Tensor, names: Sequence[str]) -> Tensor | str:
    """:func:`run` for active adapters of which at least one is no plain LoRA."""
    if (reason := why_separate(wrapper, names)) is not None:
        return reason
    y = None if is_compiling() else wrapper._variant_operation(x)
    return _summed(wrapper, x, names) if y is None else y


def _summed(wrapper: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """The linear layer's output, then one adapter after the other, as in a LoRA linear."""
    y = wrapper.base_layer(x)
    dtype = y.dtype
    for name in names:
        variant = wrapper.lora_variant.get(name)
        if variant is None:
            y = y + wrapper._update(name, x)
        else:
            y = variant.update(wrapper, name, x, y)
    return y.to(dtype)


def turned(call: Any) -> Any:
    """The call of a wrapper's parameter as one of its linear layer, whose W may be [K, N]."""
    weight, bias, A, B, scale, p, transposed = call
    return (weight, bias, B.t(), A.t(), scale, p, transposed) if transposed else call


def _traced(wrapper: Any, x: Tensor, active: Sequence[str]) -> Projection | None:
    if len(active) != 1 or active[0] not in wrapper.lora_A:
        return None
    if why_separate(wrapper, active) is not None:
        return None
    call = Linear.product_call(wrapper, x, active[0])
    if call is None or why_formula(x, call.A) is not None:
        return None
    return Projection(*turned(call))
