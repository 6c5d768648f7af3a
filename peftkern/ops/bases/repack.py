"""Quantising a changed weight again, and putting a layer's packed weight back as it was.

The file of a format whose owner can quantise has a function
``repacked(module, weight) -> State``: what the layer would hold for ``weight`` [N, K], made by the
owner's own code; for a mixture's experts ``repacked(module, weight, name)`` with [E, N, K]. Where
that depends on the layer, it has ``cannot_repack(module) -> str | None`` too, with the reason. A
:class:`State` names attributes of the layer and the objects in them, so that an old one is put back
bit for bit; it refers to the packed tensors and copies none.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .experts import PackedExperts
from .experts import reader_of as experts_reader
from .formats import numbers, reader_of
from .weight import Packed


class State(NamedTuple):
    """Attributes of a layer, by name: parameters, buffers and plain ones."""

    values: dict[str, Any]

    def put(self, module: Any) -> State:
        """Give the layer these; returns what it held under the same names."""
        before: dict[str, Any] = {}
        for name, value in self.values.items():
            before[name] = getattr(module, name)
            if name in module._parameters:
                module._parameters[name] = value
            elif name in module._buffers:
                module._buffers[name] = value
            else:
                setattr(module, name, value)
        return State(before)


def _held(module: nn.Module, name: str) -> Packed | PackedExperts | str:
    """The quantised weight called ``name``: a layer's, or one of a mixture's; or why not."""
    if (experts := experts_reader(module)) is None:
        found = numbers(module)
        return found if isinstance(found, str) else found.packed
    of_mixture = experts.read(module)
    if isinstance(of_mixture, str):
        return str(of_mixture)
    packed: PackedExperts = of_mixture.down if name == "down_proj" else of_mixture.up
    return packed


def why_not(module: nn.Module, name: str = "weight") -> str | None:
    """The reason that a weight of a known format cannot be quantised again, or None.

    Args:
        module: a linear layer, or a mixture's experts.
        name: the weight's attribute.
    """
    if reader_of(module) is None and experts_reader(module) is None:
        return f"the weight of a {type(module).__name__} is of no known format"
    found = _held(module, name)
    if isinstance(found, str):
        return found
    asked = _function(module, "cannot_repack")
    reason: str | None = None if asked is None else asked(module)
    if reason is None and _function(module) is None:
        return f"{found.format} is not made from a weight alone"
    return reason


def _function(module: nn.Module, name: str = "repacked") -> Any:
    reader: Any = reader_of(module)
    file = experts_reader(module) if reader is None else sys.modules[reader.__module__]
    return getattr(file, name, None)


def dense_value(module: nn.Module, name: str = "weight") -> Tensor:
    """The layer's weight [N, K] in float32; of experts [E, N, K].

    Raises:
        ValueError: the weight cannot be read.
    """
    found = _held(module, name)
    if isinstance(found, str):
        raise ValueError(f"the {name} of a {type(module).__name__} cannot be read: {found}")
    if isinstance(found, Packed):
        return found.dense(torch.float32)
    weight = torch.empty(found.shape, device=found.device)
    for expert in range(found.shape[0]):
        weight[expert].copy_(found.of(expert).dense(torch.float32))
    return weight


def value_of(module: Any, state: State) -> Tensor:
    """The weight [N, K], float32, that a layer held in ``state``.

    Its owner may have made the layer dense since (compressed-tensors does before a first forward).
    """
    loose: Any = module.__class__.__new__(module.__class__)
    parameters = {n: v for n, v in state.values.items() if isinstance(v, Parameter)}
    rest = {n: v for n, v in state.values.items() if n not in parameters}
    loose.__dict__ = {**module.__dict__, **rest, "_parameters": {**parameters, "bias": None}}
    return dense_value(loose)


@torch.no_grad()
def write(module: nn.Module, weight: Tensor, name: str = "weight") -> tuple[State, float]:
    """Quantise ``weight`` into the layer: (what it held before, the relative error).

    The error is ‖W' - W‖ / ‖W‖ in the Frobenius norm, W' what the layer then holds.

    Args:
        module: a linear layer, or a mixture's experts.
        weight: [N, K]; of experts [E, N, K].
        name: the weight's attribute.

    Raises:
        ValueError: the result is not finite, or the owner refuses the weight. The layer is as
            before.
    """
    wide, quantise = weight.float(), _function(module)
    made = (
        quantise(module, wide) if experts_reader(module) is None else quantise(module, wide, name)
    )
    before = made.put(module)
    try:
        error = dense_value(module, name).sub_(wide).norm().item()
    except BaseException:
        before.put(module)
        raise
    if not error < float("inf"):
        before.put(module)
        raise ValueError(
            f"a {type(module).__name__} cannot hold the merged weight: quantised again it is not "
            "finite"
        )
    return before, error / max(wide.norm().item(), torch.finfo(torch.float32).tiny)
