"""``Tuner``: the methods through which :class:`peftkern.PeftModel` uses adapters of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


@dataclass
class Decoding:
    """How steps of the base model, called by themselves, get the adapters.

    Attributes:
        context: makes a context for one step.
        first: the keywords of the first step, from those without adapters.
        front: tokens that the first step puts into the cache before the input's.
        why_no_graph: the reason that steps cannot be recorded; None when they can.
    """

    context: Callable[[], AbstractContextManager[Any]]
    first: Callable[[dict[str, Any]], dict[str, Any]]
    front: int = 0
    why_no_graph: str | None = None


class Tuner(Protocol):
    """The interface to keep, call, save and load the adapters of one method.

    ``host`` is the PeftModel, or a copy of it on another device. Modules and parameters belong to
    the host (``base_model``, …); a tuner has none of its own.

    Attributes:
        why_no_graph: the reason that steps of decoding with its adapters are not recorded as CUDA
            graphs; None where they can be.
    """

    why_no_graph: str | None

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
        """The model that was adapted, with its adapter layers."""

    def configs(self, host: Any) -> dict[str, Any]:
        """The configurations, {adapter name: configuration}."""

    def set_configs(self, host: Any, configs: dict[str, Any]) -> None:
        """Replace all configurations."""

    def active(self, host: Any) -> list[str]:
        """Names of the adapters that forward and generate use."""

    def add(
        self,
        host: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Build an adapter whose configuration is set already; an error changes no model."""

    def activate(self, host: Any, adapter_name: str, inference_mode: bool) -> None:
        """Make an adapter the active one; it trains unless ``inference_mode``."""

    def set_requires_grad(
        self, host: Any, adapter_names: str | Sequence[str], requires_grad: bool
    ) -> None:
        """Let the parameters of these adapters train, or freeze them."""

    def delete(self, host: Any, adapter_name: str) -> None:
        """Remove an adapter; when it was the active one, another becomes active."""

    def disabled(self, host: Any) -> AbstractContextManager[None]:
        """A context in which calls go to the base model alone."""

    def supports_lora_conversion(self, host: Any, adapter_name: str) -> bool:
        """True when the adapter can be written as plain LoRA."""

    def forward(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The adapted model's output."""

    def generate(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tokens that the adapted model generates."""

    def decoding(self, host: Any, ids: Any, names: Sequence[str] | None) -> Decoding:
        """How single steps of the base model decode prompts ``ids`` [B, T] with the adapters.

        ``names``: the adapter of each row; None: the active one.
        """

    def check_requests(self, host: Any, names: Sequence[str] | None) -> None:
        """Raise an error when requests of continuous batching cannot take these adapters.

        ``names``: None for the active ones, which need not be told apart.
        """

    def prepare_inputs(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The inputs of one step of generation."""

    def loading(
        self, host: Any, adapter_name: str, is_trainable: bool
    ) -> AbstractContextManager[None]:
        """A context in which saved tensors can be copied into the adapter."""

    def loaded(self, host: Any, adapter_name: str, is_trainable: bool, first: bool) -> None:
        """Let a newly loaded adapter train, or freeze it; ``first``: loaded with its model."""

    def active_state(self, host: Any) -> Any:
        """The state of what is active, to hand to :meth:`withdraw`."""

    def withdraw(self, host: Any, adapter_name: str, active: Any) -> None:
        """Remove an adapter that was added and could not be loaded.

        ``active`` is the value of :meth:`active_state` from before it was added.
        """

    def take_down(self, host: Any, adapter_name: str, model: nn.Module, kept: bool) -> None:
        """Give ``model`` back after its first adapter could not be loaded.

        With ``kept`` the caller puts the model's modules back.
        """
