"""HF PEFT's address of the configurations' base classes."""

from .configs.base import PeftConfig, PeftConfigMixin
from .configs.prompt_learning import PromptLearningConfig
from .utils.constants import CONFIG_NAME
from .utils.peft_types import PeftType, TaskType

__all__ = [
    "CONFIG_NAME",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "PromptLearningConfig",
    "TaskType",
]
