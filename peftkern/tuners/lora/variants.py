"""The variants of LoRA there are, under HF PEFT's names; what one is says :mod:`.variant`."""

from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from .variant import LoraVariant

__all__ = [
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "LoraVariant",
]
