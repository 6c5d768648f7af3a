"""HF PEFT's address of ``LoraConfig`` and of the configurations that it may contain."""

from ...configs.base import PeftConfig
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
from ...utils.peft_types import PeftType

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftType",
    "VeloraConfig",
]
