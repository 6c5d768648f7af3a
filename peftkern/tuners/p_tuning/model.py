"""``PromptEncoder``: virtual tokens that a small network computes while they train."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ...configs.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from ..prompting.encoder import BasePromptEncoder

MLP_LAYERS = 2  # hidden layers of the MLP; `encoder_num_layers` does not change it


class PromptEncoder(BasePromptEncoder):
    """Virtual tokens [P, token_dim] from an MLP, or from a bidirectional LSTM and an MLP.

    P is num_virtual_tokens * num_transformer_submodules.

    Args:
        config: with its sizes filled in. In inference mode there is no network.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        assert config.encoder_hidden_size is not None
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = hidden = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * (
            config.num_transformer_submodules or 1
        )
        self.encoder_type = PromptEncoderReparameterizationType(
            config.encoder_reparameterization_type
        )
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if config.inference_mode:
            return
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                input_size=self.input_size,
                hidden_size=hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            widths = [2 * hidden, 2 * hidden, self.output_size]
        else:
            if config.encoder_num_layers != MLP_LAYERS:
                warnings.warn(
                    f"for {self.encoder_type.value}, the argument `encoder_num_layers` is ignored. "
                    f"Exactly {MLP_LAYERS} MLP layers are used.",
                    stacklevel=2,
                )
            widths = [self.input_size, hidden, hidden, self.output_size]
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(width, following))
        self.mlp_head = nn.Sequential(*layers)

    @property
    def has_network(self) -> bool:
        return self.mlp_head is not None

    def through_network(self, tokens: Tensor) -> Tensor:
        if self.lstm_head is not None:
            tokens = self.lstm_head(tokens)[0]
        return tokens if self.mlp_head is None else self.mlp_head(tokens)
