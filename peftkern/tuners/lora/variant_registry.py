"""Imports of all variants of LoRA, which enter themselves into the tables of :mod:`.variant`.

The names are HF PEFT's.
"""

from .alora import (
    ALoraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from .arrow import ArrowLinearVariant
from .bdlora import BdLoraLinearVariant, BlockDiagonalLinear
from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from .dora_parameter import DoraParameterVariant
from .kasa import KasaLinearVariant
from .monteclora import MontecloraLinearVariant
from .parallel_dora import ParallelDoraEmbedding, ParallelDoraLinear
from .qalora import QALoraLinearVariant
from .variant import LoraVariant
from .velora import VeloraLinearVariant

__all__ = [
    "ALoraLinearVariant",
    "ArrowLinearVariant",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "DoraParameterVariant",
    "KasaLinearVariant",
    "LoraVariant",
    "MontecloraLinearVariant",
    "ParallelDoraEmbedding",
    "ParallelDoraLinear",
    "QALoraLinearVariant",
    "VeloraLinearVariant",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
]
