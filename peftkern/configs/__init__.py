"""Configurations of adapters: for each method a dataclass with the keys of ``adapter_config.json``.

All of them are imported here, so that a file is always read as the class of the method that it
names.
"""

from .base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftConfigMixin
from .lora import LoraConfig
from .p_tuning import PromptEncoderConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_learning import PromptLearningConfig
from .prompt_tuning import PromptTuningConfig

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "LoraConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
]
