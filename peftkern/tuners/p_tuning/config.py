"""HF PEFT's address of ``PromptEncoderConfig``."""

from ...configs.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType

__all__ = ["PromptEncoderConfig", "PromptEncoderReparameterizationType"]
