"""What an adapter is asked to be: for each method a dataclass, as ``adapter_config.json`` has it.

All of them are imported here, so that a file is read as the class of the method that it names,
whichever of them was imported first.
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
