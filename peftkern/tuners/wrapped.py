"""The parts of :class:`PeftModel` that files below it know: a base class and a protocol."""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import nn

from ..configs.base import PeftConfig
from ..utils.peft_types import PeftType
from .tuner import Tuner


class Wrapped:
    """A base class of :class:`peftkern.PeftModel`."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations, {adapter name: configuration}."""
        raise NotImplementedError

    def get_base_model(self) -> nn.Module:
        """The model that was wrapped, with its adapter layers."""
        raise NotImplementedError


class Adapted(Protocol):
    """A :class:`peftkern.PeftModel`, as far as its base classes know it; an ``nn.Module``."""

    base_model: Any
    tuner: Tuner
    peft_type: PeftType

    @property
    def peft_config(self) -> dict[str, Any]: ...

    @property
    def active_peft_config(self) -> Any: ...

    @property
    def active_adapters(self) -> list[str]: ...

    @property
    def has_active_enabled_adapter(self) -> bool: ...

    def get_base_model(self) -> nn.Module: ...

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None: ...

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None: ...


def innermost(model: Any) -> Any:
    """The transformers model inside any number of PeftModels."""
    while isinstance(model, Wrapped):
        model = model.get_base_model()
    return model
