"""Prompt tuning (Lester et al., 2021): the configuration; the model is not built yet."""

from .config import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptTuningConfig", "PromptTuningInit"]
