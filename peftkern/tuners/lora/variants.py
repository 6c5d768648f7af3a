"""HF PEFT's address of the variants of LoRA."""

from ...configs.base import PeftConfig
from ...configs.lora import BdLoraConfig, LoraConfig, MontecloraConfig
from ...tuners.lora.variant_registry import (
    ALoraLinearVariant,
    ArrowLinearVariant,
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
    QALoraLinearVariant,
    VeloraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from ...utils.module_tree import transpose
from .._buffer_dict import BufferDict
from .arrow import ArrowLoraLinearLayer
from .base import LoraLayer
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd
from .embedding import Embedding
from .linear import Linear
from .monteclora import MontecloraSampler
from .velora import (
    VeloraFunction,
    _get_group_dim,
    _normalize_projection,
    _reshape_to_grouped_subtokens,
)

__all__ = [
    "ArrowLinearVariant",
    "ArrowLoraLinearLayer",
    "ALoraLinearVariant",
    "BdLoraConfig",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "BufferDict",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "Embedding",
    "KasaLinearVariant",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "MontecloraConfig",
    "MontecloraLinearVariant",
    "MontecloraSampler",
    "PeftConfig",
    "VeloraFunction",
    "QALoraLinearVariant",
    "VeloraLinearVariant",
    "_ConvNd",
    "_get_group_dim",
    "_normalize_projection",
    "_reshape_to_grouped_subtokens",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
    "transpose",
]
