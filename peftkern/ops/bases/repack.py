"""Quantising a changed weight again, and putting a layer's packed weight back as it was.

The file of a format whose owner can quantise has a function
``repacked(module, weight) -> State``: what the layer would hold for ``weight`` [N, K], made by the
owner's own code. A :class:`State` names attributes of the layer and the objects in them, so that an
old one is put back bit for bit; it refers to the packed tensors and copies none. Where that depends
on the layer, the file has a function ``cannot_repack(module) -> str | None`` too, with the reason.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .formats import numbers, reader_of


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


def why_not(module: nn.Module) -> str | None:
    """The reason that a layer of a known format cannot be quantised again, or None."""
    reader = reader_of(module)
    if reader is None:
        return f"the weight of a {type(module).__name__} is of no known format"
    found = numbers(module)
    if isinstance(found, str):
        return found
    if _function(module) is None:
        return f"{found.packed.format} is not made from a weight alone"
    asked = _function(module, "cannot_repack")
    reason: str | None = None if asked is None else asked(module)
    return reason


def _function(module: nn.Module, name: str = "repacked") -> Any:
    reader: Any = reader_of(module)
    return getattr(sys.modules[reader.__module__], name, None)


def dense_value(module: nn.Module) -> Tensor:
    """The layer's weight [N, K] in float32.

    Raises:
        ValueError: the weight cannot be read.
    """
    found = numbers(module)
    if isinstance(found, str):
        raise ValueError(f"the weight of a {type(module).__name__} cannot be read: {found}")
    return found.packed.dense(torch.float32)


@torch.no_grad()
def write(module: nn.Module, weight: Tensor) -> tuple[State, float]:
    """Quantise ``weight`` [N, K] into the layer: (what it held before, the relative error).

    The error is ‖W' - W‖ / ‖W‖ in the Frobenius norm, W' what the layer then holds.

    Raises:
        ValueError: the result is not finite, or the owner refuses the weight. The layer is as
            before.
    """
    wide = weight.float()
    before = _function(module)(module, wide).put(module)
    try:
        error = dense_value(module).sub_(wide).norm().item()
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
