"""Inputs of a formula whose gradients are taken while their own history is still there.

A backward that makes a graph (``create_graph=True``) differentiates the plain formula with respect
to its saved inputs. Those may be functions of each other, as routing weights are of the tokens, or
one tensor twice, as keys that are values too. ``torch.autograd.grad`` would follow that history,
and give the one input the share that reaches it through the other, which autograd adds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


def apart(tensors: Sequence[T]) -> list[T]:
    """A view of each tensor; none is a function of another. Gradients must be enabled."""
    return [t if t is None else t.view_as(t) for t in tensors]
