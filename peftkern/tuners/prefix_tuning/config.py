"""Configuration of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values in front of every layer's own.

    Args:
        init_weights: "zero" starts with a prefix of zeros, None with a random one.
        encoder_hidden_size: hidden size of the projection MLP.
        prefix_projection: whether the prefix passes through that MLP.
    """

    init_weights: str | None = field(default=None)
    encoder_hidden_size: int | None = field(default=None)
    prefix_projection: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
