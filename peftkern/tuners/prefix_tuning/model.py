"""``PrefixEncoder``: the keys and values of all layers, as one row for each virtual token."""

from __future__ import annotations

from torch import Tensor, nn

from ...configs.prefix_tuning import PrefixTuningConfig
from ..prompting.encoder import BasePromptEncoder


class PrefixEncoder(BasePromptEncoder):
    """Virtual tokens [P, num_layers * 2 * token_dim]: a key and a value for every layer.

    With ``prefix_projection`` (while training) a two-layer MLP makes them from [P, token_dim].

    Args:
        config: with ``num_virtual_tokens``, ``num_layers``, ``token_dim`` and, for the projection,
            ``encoder_hidden_size`` filled in.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        P, dim, hidden = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        assert P is not None and dim is not None and config.num_layers is not None
        out = config.num_layers * 2 * dim
        self.prefix_projection = config.prefix_projection
        self.transform: nn.Sequential | None = None
        zero = config.init_weights == "zero"
        if config.prefix_projection and not config.inference_mode:
            assert hidden is not None
            self.embedding = nn.Embedding(P, dim)
            first, last = nn.Linear(dim, hidden), nn.Linear(hidden, out)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
            if zero:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        else:
            self.embedding = nn.Embedding(P, out)
            if zero:
                nn.init.zeros_(self.embedding.weight)

    @property
    def has_network(self) -> bool:
        return self.transform is not None

    def through_network(self, tokens: Tensor) -> Tensor:
        return tokens if self.transform is None else self.transform(tokens)
