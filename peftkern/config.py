"""HF PEFT's address of the configurations' base classes."""

from .configs.base import PeftConfig, PeftConfigMixin
from .configs.prompt_learning import PromptLearningConfig

__all__ = ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig"]
