"""Models that apply known dropout masks, from whatever backend."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Drops(nn.Module):
    """Dropout with a mask that is known already."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.factor = keep / (1 - p)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.view_as(x)


def with_masks(model: nn.Module, words: list[Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of an adapted model in ``dtype`` that drops by packed masks, with torch's products.

    There is one mask for each adapted layer, in the layers' order.
    """
    from peftkern.ops.bits import unpack_bits

    found = copy.deepcopy(model).to(dtype)
    layers = [m for m in found.modules() if hasattr(m, "lora_A")]
    for layer, mask in zip(layers, words, strict=True):
        keep = unpack_bits(mask, layer.in_features, dtype)
        drops = Drops(keep, layer.lora_dropout["default"].p)
        layer.lora_dropout["default"] = drops.train(layer.training)
    return found
