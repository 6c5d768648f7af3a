"""P-tuning (Liu et al., 2021, arXiv 2103.10385)."""

from ...configs.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .model import PromptEncoder

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]
