"""LoRA (Hu et al., 2021, arXiv 2106.09685) on fused operations."""

from .attention import MultiheadAttention
from .base import LoraLayer
from .config import LoraConfig
from .conv import Conv1d, Conv2d, Conv3d
from .conversion import convert_to_lora, save_as_lora
from .corda import preprocess_corda
from .embedding import Embedding
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import Linear
from .loraga import preprocess_loraga
from .mixed import AdapterNames
from .model import LoraModel
from .parameter import ParamWrapper
from .subconfigs import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "AdapterNames",
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
    "ParamWrapper",
    "convert_to_lora",
    "save_as_lora",
]
