"""LoRA (Hu et al., 2021, arXiv 2106.09685) on fused operations."""

from .base import LoraLayer
from .config import LoraConfig, LoraRuntimeConfig
from .conversion import convert_to_lora, save_as_lora
from .embedding import Embedding
from .layer import Linear
from .mixed import AdapterNames
from .model import LoraModel

__all__ = [
    "AdapterNames",
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "save_as_lora",
]
