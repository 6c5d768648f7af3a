"""P-tuning (Liu et al., 2021, arXiv 2103.10385)."""

from typing import TYPE_CHECKING

from ...configs.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from ...utils.lazy import lazily
from .model import PromptEncoder

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]

if not TYPE_CHECKING:  # finds the files at HF PEFT's addresses, which nothing here imports
    __getattr__ = lazily(__name__, {})[1]
