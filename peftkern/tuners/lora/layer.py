"""HF PEFT's address of the LoRA layer classes."""

from ...configs.lora import LoraConfig
from ...utils.constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from ...utils.integrations import skip_init_on_device
from ...utils.module_tree import transpose
from ...utils.warning import PeftWarning
from .._buffer_dict import BufferDict
from ..adapter_calls import check_adapters_to_merge
from ..base_layer import BaseTunerLayer
from .attention import MultiheadAttention
from .base import LoraLayer
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd
from .embedding import Embedding
from .linear import Linear
from .parameter import ParamWrapper
from .parameter_proxies import _LoraFactorsProxy, _LoraParameterProxy
from .variant import LoraVariant

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "BaseTunerLayer",
    "BufferDict",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "MultiheadAttention",
    "ParamWrapper",
    "PeftWarning",
    "UPCAST_DTYPES",
    "_ConvNd",
    "_LoraFactorsProxy",
    "_LoraParameterProxy",
    "check_adapters_to_merge",
    "skip_init_on_device",
    "transpose",
]
