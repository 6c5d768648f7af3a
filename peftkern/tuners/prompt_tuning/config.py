"""HF PEFT's address of ``PromptTuningConfig``."""

from ...configs.prompt_tuning import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptTuningConfig", "PromptTuningInit"]
