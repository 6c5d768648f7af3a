"""HF PEFT's address of the variants of LoRA."""

from ...tuners.lora.variant_registry import (
    ALoraLinearVariant,
    BdLoraLinearVariant,
    BlockDiagonalLinear,
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    KasaLinearVariant,
    LoraVariant,
    MontecloraLinearVariant,
    VeloraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)

__all__ = [
    "ALoraLinearVariant",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "KasaLinearVariant",
    "LoraVariant",
    "MontecloraLinearVariant",
    "VeloraLinearVariant",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
]
