"""HF PEFT's address of ``PromptEncoderConfig``."""

from ...configs.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from ...configs.prompt_learning import PromptLearningConfig
from ...utils.peft_types import PeftType

__all__ = [
    "PeftType",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
]
