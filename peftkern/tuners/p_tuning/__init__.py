"""P-tuning (Liu et al., 2021): the configuration; the model is not built yet."""

from .config import PromptEncoderConfig, PromptEncoderReparameterizationType

__all__ = ["PromptEncoderConfig", "PromptEncoderReparameterizationType"]
