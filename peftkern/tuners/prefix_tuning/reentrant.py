"""Gradients of a prefix through reentrant checkpoints.

A reentrant checkpoint gives gradients to the tensors it is called with, and runs a backward of its
own inside the outer one. A prefix that a layer closes over would get none where the model is
frozen (nothing the layer is called with asks for any), and where it is computed (a projection),
the second layer's backward would find the graph of that computation used up. So the layers see
leaves, which collect what every inner backward brings; what the first layer is called with passes
through a node that is reached once all of them are done, and hands the sums on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...utils.private import CHECKPOINT_RUNNER
from ...utils.versions import in_checkpoint
from .state import Prefix, PrefixState


def is_reentrant(layer: nn.Module) -> bool:
    """Whether transformers will run this layer in a reentrant checkpoint now."""
    if not in_checkpoint(layer):
        return False
    run = getattr(layer, CHECKPOINT_RUNNER, None)
    return bool(getattr(run, "keywords", {}).get("use_reentrant", False))


class _Collect(torch.autograd.Function):
    """hidden [B, T, d] -> itself; backward adds the leaves' gradients for the prefixes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *prefixes: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sums = []
        for leaf in ctx.leaves:
            sums.append(leaf.grad)
            leaf.grad = None  # another backward through this graph begins anew
        return grad, None, *sums


@torch.compiler.assume_constant_result
def _refuse_in_trace() -> int:
    # called while tracing: an error raised by traced code would only break the graph
    raise ValueError(
        "torch.compile loses the prefix's gradient in reentrant checkpoints; allowed: "
        'gradient_checkpointing_enable({"use_reentrant": False}), or no torch.compile'
    )


def use_leaves(state: PrefixState) -> None:
    """Puts leaves in place of the prefixes, and the prefixes where :func:`collect` finds them."""
    if torch.compiler.is_compiling():
        _refuse_in_trace()
    originals: list[Tensor] = []
    leaves: list[Tensor] = []
    pairs: list[Prefix | None] = []
    for pair in state.prefixes:
        if pair is None:
            pairs.append(None)
            continue
        both = []
        for tensor in pair:
            if tensor.requires_grad:
                originals.append(tensor)
                tensor = tensor.detach().requires_grad_()
                leaves.append(tensor)
            both.append(tensor)
        pairs.append((both[0], both[1]))
    if leaves:
        state.prefixes = tuple(pairs)
        state.collected = (leaves, originals)


def collect(hidden: Tensor, state: PrefixState) -> Tensor:
    """To call on what the first layer is called with."""
    if state.collected is None:
        return hidden
    if torch.compiler.is_compiling():
        _refuse_in_trace()
    leaves, originals = state.collected
    return _Collect.apply(hidden, leaves, *originals)
