"""HF PEFT's address of the kinds of LoRA layers."""

from .attention import MultiheadAttention
from .base import LoraLayer
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd
from .embedding import Embedding
from .linear import Linear
from .parameter import ParamWrapper, _LoraFactorsProxy, _LoraParameterProxy
from .variant import LoraVariant

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "LoraVariant",
    "MultiheadAttention",
    "ParamWrapper",
    "_ConvNd",
    "_LoraFactorsProxy",
    "_LoraParameterProxy",
]
