"""Configuration of p-tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..utils.peft_types import PeftType
from .checks import one_of, positive
from .prompt_learning import PromptLearningConfig


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that computes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig, method=PeftType.P_TUNING):
    """P-tuning: trained embeddings before the input, computed by a small network.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: the network's hidden size; None: ``token_dim``.
        encoder_num_layers: number of its layers.
        encoder_dropout: its dropout probability.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = field(
        default=PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = field(default=None)
    encoder_num_layers: int = field(default=2)
    encoder_dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        one_of(
            PromptEncoderReparameterizationType,
            self.encoder_reparameterization_type,
            "encoder_reparameterization_type",
        )
        positive("encoder_hidden_size", self.encoder_hidden_size, optional=True)
        positive("encoder_num_layers", self.encoder_num_layers)
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(
                f"`encoder_dropout` must be at least 0 and below 1, got {self.encoder_dropout!r}"
            )

    @property
    def trains_network(self) -> bool:
        return True
