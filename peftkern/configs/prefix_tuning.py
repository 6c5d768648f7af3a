"""Configuration of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..utils.peft_types import PeftType
from .checks import positive
from .prompt_learning import PromptLearningConfig


@dataclass
class PrefixTuningConfig(PromptLearningConfig, method=PeftType.PREFIX_TUNING):
    """Prefix tuning: trained keys and values before every layer's own.

    Args:
        init_weights: "zero" starts with a prefix of zeros, None with a random one.
        encoder_hidden_size: hidden size of the projection MLP.
        prefix_projection: True: that MLP computes the prefix.
        prefix_always_visible: for layers with a sliding window. False, as in HF PEFT: the prefix
            counts as the first tokens, which later tokens no longer see. True: the window counts
            only the sequence's own tokens, and the whole prefix stays visible (positions are the
            same). HF PEFT does not know the key: it warns that it ignores it when it reads such a
            file. Files of other prefixes do not contain it.
    """

    init_weights: str | None = field(default=None)
    encoder_hidden_size: int | None = field(default=None)
    prefix_projection: bool = field(default=False)
    prefix_always_visible: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        positive("encoder_hidden_size", self.encoder_hidden_size, optional=True)
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"`init_weights` must be None or 'zero', got {self.init_weights!r}")
        if self.token_dim and self.num_attention_heads:
            check_divides(self.token_dim, self.num_attention_heads)
        if not isinstance(self.prefix_always_visible, bool):
            raise ValueError(
                f"`prefix_always_visible` must be True or False, got {self.prefix_always_visible!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values.

        ``prefix_always_visible`` is left out unless it is True, as HF PEFT would warn of it.
        """
        values = super().to_dict()
        if not self.prefix_always_visible:
            del values["prefix_always_visible"]
        return values

    @property
    def trains_network(self) -> bool:
        return self.prefix_projection


def check_divides(token_dim: int, num_attention_heads: int) -> None:
    """Raise a ValueError unless ``token_dim`` is a multiple of ``num_attention_heads``."""
    if token_dim % num_attention_heads:
        raise ValueError(
            f"`token_dim` must be a multiple of `num_attention_heads`, got {token_dim} and "
            f"{num_attention_heads}"
        )
