"""What :class:`peftkern.PeftModel` asks of its adapters, whatever their method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn


class Tuner(Protocol):
    """How adapters of one method are kept, called, saved and loaded.

    ``host`` is the PeftModel, or a copy of it on another device: modules and parameters are the
    host's (``base_model``, …), a tuner has none of its own.
    """

    def start(
        self,
        host: Any,
        model: nn.Module,
        adapter_name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adapt ``model`` in place, with its first adapter, and make it ``host.base_model``."""

    def base(self, host: Any) -> nn.Module:
        """The model that was adapted, adapter layers included."""

    def configs(self, host: Any) -> dict[str, Any]:
        """{adapter name: configuration}."""

    def set_configs(self, host: Any, configs: dict[str, Any]) -> None:
        """Replace all configurations."""

    def active(self, host: Any) -> list[str]:
        """Names of the adapters that calls go through."""

    def add(
        self,
        host: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Build an adapter whose configuration is there already; the model is as it was after an
        error."""

    def activate(self, host: Any, adapter_name: str, inference_mode: bool) -> None:
        """Make an adapter the active one; it trains unless ``inference_mode``."""

    def set_requires_grad(
        self, host: Any, adapter_names: str | Sequence[str], requires_grad: bool
    ) -> None:
        """Let the parameters of these adapters train, or freeze them."""

    def delete(self, host: Any, adapter_name: str) -> None:
        """Remove an adapter; another becomes active when it was."""

    def disabled(self, host: Any) -> AbstractContextManager[None]:
        """Within the block calls go to the base model."""

    def supports_lora_conversion(self, host: Any, adapter_name: str) -> bool:
        """Whether the adapter can be written as plain LoRA."""

    def forward(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The adapted model's output."""

    def generate(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the adapted model generates."""

    def prepare_inputs(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The inputs of one step of generation."""

    def loading(
        self, host: Any, adapter_name: str, is_trainable: bool
    ) -> AbstractContextManager[None]:
        """Within the block the adapter takes saved tensors."""

    def loaded(self, host: Any, adapter_name: str, is_trainable: bool, first: bool) -> None:
        """Let an adapter that was loaded anew train, or not; ``first``: with its model."""

    def active_state(self, host: Any) -> Any:
        """What is active, for :meth:`withdraw`."""

    def withdraw(self, host: Any, adapter_name: str, active: Any) -> None:
        """Take out an adapter that was added and could not be loaded; ``active``: what
        :meth:`active_state` said before."""

    def take_down(self, host: Any, adapter_name: str, model: nn.Module, kept: bool) -> None:
        """Give ``model`` back after its first adapter could not be loaded; ``kept``: the caller
        puts its modules back."""
