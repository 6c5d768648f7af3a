"""HF PEFT's address of ``PrefixTuningConfig``."""

from ...configs.prefix_tuning import PrefixTuningConfig
from ...configs.prompt_learning import PromptLearningConfig
from ...utils.peft_types import PeftType

__all__ = [
    "PeftType",
    "PrefixTuningConfig",
    "PromptLearningConfig",
]
