"""Prompt tuning (Lester et al., 2021, arXiv 2104.08691)."""

from typing import TYPE_CHECKING

from ...configs.prompt_tuning import PromptTuningConfig, PromptTuningInit
from ...utils.lazy import lazily
from .model import PromptEmbedding

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]

if not TYPE_CHECKING:  # finds the files at HF PEFT's addresses, which nothing here imports
    __getattr__ = lazily(__name__, {})[1]
