"""Prompt tuning (Lester et al., 2021, arXiv 2104.08691)."""

from ...configs.prompt_tuning import PromptTuningConfig, PromptTuningInit
from .model import PromptEmbedding

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]
