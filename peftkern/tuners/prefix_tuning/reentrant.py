"""Gradients of a prefix through reentrant checkpoints.

A reentrant checkpoint gives gradients to the tensors that it is called with, and runs a backward of
its own inside the outer one. A prefix is not among these tensors. In a frozen model it would get no
gradient, as no tensor of the call requires one. And where a projection computes the prefix, the
first inner backward would free that graph, and the next one would fail.

So the layers see leaves, in which the inner backwards sum their gradients. The input of the first
layer passes through a node (``_Collect``). Its backward runs after those of all layers and hands
the sums on to the prefixes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...utils.private import CHECKPOINT_RUNNER
from ...utils.versions import in_checkpoint
from .state import Prefix, PrefixState


def is_reentrant(layer: nn.Module) -> bool:
    """True when transformers will run this layer in a reentrant checkpoint now."""
    if not in_checkpoint(layer):
        return False
    run = getattr(layer, CHECKPOINT_RUNNER, None)
    return bool(getattr(run, "keywords", {}).get("use_reentrant", False))


class _Collect(torch.autograd.Function):
    """The identity on hidden [B, T, d]; backward gives the prefixes their leaves' gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *prefixes: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sums = []
        for leaf in ctx.leaves:
            sums.append(leaf.grad)
            leaf.grad = None  # another backward through this graph starts from zero
        return grad, None, *sums


@torch.compiler.assume_constant_result
def _refuse_in_trace() -> int:
    # runs while the compiler traces: an error raised by traced code would only break the graph
    raise ValueError(
        "torch.compile loses the prefix's gradient in reentrant checkpoints; allowed: "
        'gradient_checkpointing_enable({"use_reentrant": False}), or no torch.compile'
    )


def use_leaves(state: PrefixState) -> None:
    """Replace the prefixes in ``state`` by leaves, and keep the prefixes for :func:`collect`."""
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
    """The first layer's input [B, T, d], through a node that passes the prefixes' gradients on."""
    if state.collected is None:
        return hidden
    if torch.compiler.is_compiling():
        _refuse_in_trace()
    leaves, originals = state.collected
    return _Collect.apply(hidden, leaves, *originals)
