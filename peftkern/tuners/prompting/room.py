"""``Room``: the number of positions for which a model has learned vectors."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sizes import has_config, text_config

# modules that hold one vector for each position, by the last part of their names
TABLES = ("wpe", "position_embeddings", "embed_positions")


class Room:
    """The limit of positions of ``model``, or of one half of an encoder-decoder model.

    Args:
        model: a transformers model.
        decoder: True for the decoder of an encoder-decoder model, False for its encoder.
    """

    def __init__(self, model: Any, decoder: bool) -> None:
        self.owner = type(model).__name__
        self.config = text_config(model) if has_config(model) else None
        part = model
        if getattr(self.config, "is_encoder_decoder", False):
            part = model.get_decoder() if decoder else model.get_encoder()
        elif (
            self.config is not None
            and self.config is not model.config
            and hasattr(model, "get_decoder")
        ):
            part = model.get_decoder()  # the text part of a model of text and images
        self.tables = [
            module
            for name, module in part.named_modules()
            if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding)
        ]

    @property
    def limit(self) -> int | None:
        """The number of positions; None when positions are computed and not learned."""
        limits = []
        for table in self.tables:
            limits.append(table.num_embeddings)
            if table.padding_idx is not None:  # RoBERTa's positions start after the padding's row
                limits[-1] -= table.padding_idx + 1
        most = getattr(self.config, "max_position_embeddings", None)
        return min([*limits, most or limits[0]]) if limits else None

    def check(self, P: int, tokens: int) -> None:
        """Raise a ValueError when P virtual and ``tokens`` input tokens need more positions."""
        limit = self.limit
        if limit is not None and P + tokens > limit:
            raise ValueError(
                f"`num_virtual_tokens` ({P}) and the input ({tokens} tokens) need {P + tokens} "
                f"positions, but {self.owner} has {limit} (max_position_embeddings)"
            )
