"""HF PEFT's address of ``PromptTuningConfig``."""

from ...configs.prompt_learning import PromptLearningConfig
from ...configs.prompt_tuning import PromptTuningConfig, PromptTuningInit
from ...utils.peft_types import PeftType

__all__ = [
    "PeftType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
]
