"""What stands around a base model, for files that know of no :class:`PeftModel`."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapped:
    """A base class of :class:`peftkern.PeftModel`."""

    def get_base_model(self) -> nn.Module:
        """The model that was wrapped, adapter layers included."""
        raise NotImplementedError


def innermost(model: Any) -> Any:
    """The transformers model inside any number of PeftModels."""
    while isinstance(model, Wrapped):
        model = model.get_base_model()
    return model
