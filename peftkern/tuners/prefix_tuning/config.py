"""Configuration of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PromptLearningConfig, positive
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
        positive("encoder_hidden_size", self.encoder_hidden_size, optional=True)
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"`init_weights` must be None or 'zero', got {self.init_weights!r}")
        if self.token_dim and self.num_attention_heads:
            check_divides(self.token_dim, self.num_attention_heads)

    @property
    def trains_network(self) -> bool:
        return self.prefix_projection


def check_divides(token_dim: int, num_attention_heads: int) -> None:
    """Raise a ValueError when heads of equal size cannot make up a key."""
    if token_dim % num_attention_heads:
        raise ValueError(
            f"`token_dim` must be a multiple of `num_attention_heads`, got {token_dim} and "
            f"{num_attention_heads}"
        )
