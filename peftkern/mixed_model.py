"""``PeftMixedModel``, which peftkern does not support: every use raises an error that says so."""

from __future__ import annotations

from typing import Any, NoReturn

INSTEAD = (
    "PeftMixedModel (adapters of several methods in one model) is not supported by peftkern, which "
    "has one method that adapts layers. For several LoRA adapters at once use PeftModel: "
    "`add_adapter` or `load_adapter`, then `model.base_model.set_adapter([name, name])`; for one "
    "made of several, `model.add_weighted_adapter`."
)


class PeftMixedModel:
    """A name for code that imports it; every use raises a NotImplementedError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(INSTEAD)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(INSTEAD)
