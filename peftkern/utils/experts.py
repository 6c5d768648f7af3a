"""The experts of a mixture: which modules hold them, and adapters of single experts in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# the parameters that transformers' functions for experts read, beside biases and norms
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
# what `transformers.integrations.use_experts_implementation` sets on every module of its classes
_FLAGS = ("has_gate", "has_bias", "is_transposed")


def has_experts(module: nn.Module) -> bool:
    """True for a module of a class that transformers' interface for experts may run."""
    return all(name in module.__dict__ for name in _FLAGS)


def fuse_experts(layers: Sequence[Sequence[Tensor]], side: str) -> Tensor:
    """lora_A [r·E, K] or lora_B [N, r·E] for a parameter that holds the weights of E experts.

    Args:
        layers: for each of the L linear layers that the parameter replaces, the tensors of its E
            experts: [r/L, K] each, or [N/L, r/L].
        side: "lora_A" or "lora_B". Each layer has its own block in B, so that no layer gets the
            update of another.
    """
    stacked = [torch.stack(list(layer)) for layer in layers]
    if side == "lora_A":
        return torch.cat(stacked, dim=1).flatten(0, 1)
    experts = range(len(stacked[0]))
    blocks = torch.stack([torch.block_diag(*(layer[e] for layer in stacked)) for e in experts])
    return blocks.permute(1, 2, 0).flatten(1, 2)
