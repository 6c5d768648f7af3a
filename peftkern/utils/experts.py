"""Experts' adapters as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_experts(layers: Sequence[Sequence[Tensor]], side: str) -> Tensor:
    """lora_A [r·E, K] or lora_B [N, r·E] of a parameter that E experts share.

    Args:
        layers: for each of the L linear layers that the parameter stands for, the experts' own:
            E times [r/L, K], or [N/L, r/L].
        side: "lora_A" or "lora_B". B gets a block of its own for each layer, so that none gets
            another one's update.
    """
    stacked = [torch.stack(list(layer)) for layer in layers]
    if side == "lora_A":
        return torch.cat(stacked, dim=1).flatten(0, 1)
    experts = range(len(stacked[0]))
    blocks = torch.stack([torch.block_diag(*(layer[e] for layer in stacked)) for e in experts])
    return blocks.permute(1, 2, 0).flatten(1, 2)
