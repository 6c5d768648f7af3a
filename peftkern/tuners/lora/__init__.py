"""LoRA (Hu et al., 2021, arXiv 2106.09685) on fused operations."""

from typing import TYPE_CHECKING

from ...configs.lora import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    VeloraConfig,
)
from ...configs.lora_options import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)
from ...utils.lazy import lazily
from . import variant_registry as variant_registry
from .attention import MultiheadAttention
from .base import LoraLayer
from .conv import Conv1d, Conv2d, Conv3d
from .conversion import convert_to_lora, save_as_lora
from .corda import preprocess_corda
from .embedding import Embedding
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .intruders import reduce_intruder_dimension
from .linear import Linear
from .loraga import preprocess_loraga
from .model import LoraModel
from .parameter import ParamWrapper
from .row_adapters import AdapterNames

__all__ = [
    "AdapterNames",
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultiheadAttention",
    "VeloraConfig",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "reduce_intruder_dimension",
    "ParamWrapper",
    "convert_to_lora",
    "save_as_lora",
]

if not TYPE_CHECKING:  # finds the files at HF PEFT's addresses, which nothing here imports
    __getattr__ = lazily(__name__, {})[1]
