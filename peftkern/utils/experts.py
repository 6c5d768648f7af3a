"""``fuse_experts``: joins the adapters of experts into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_experts(layers: Sequence[Sequence[Tensor]], side: str) -> Tensor:
    """lora_A [r·E, K], lora_B [N, r·E] or DoRA's magnitude [E, N] of a parameter of E experts.

    Args:
        layers: for each of the L linear layers that the parameter replaces, the tensors of its E
            experts: [r/L, K] each, or [N/L, r/L], or [N/L].
        side: "lora_A", "lora_B" or "lora_magnitude_vector". In lora_B each layer has its own
            block, so that no layer gets the update of another.
    """
    stacked = [torch.stack(list(layer)) for layer in layers]
    if side == "lora_A":
        return torch.cat(stacked, dim=1).flatten(0, 1)
    if side == "lora_magnitude_vector":
        return torch.cat(stacked, dim=1)
    experts = range(len(stacked[0]))
    blocks = torch.stack([torch.block_diag(*(layer[e] for layer in stacked)) for e in experts])
    return blocks.permute(1, 2, 0).flatten(1, 2)
