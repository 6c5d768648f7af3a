"""``LoraTuner``: LoRA for :class:`peftkern.PeftModel`.

It works through the host's ``base_model``, a :class:`.model.LoraModel`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from ...utils.generation import generation_setting, row_repeats
from ...utils.handing import handing
from ..tuner import Decoding
from .base import LoraLayer
from .group import ungroup_broken
from .model import LoraModel
from .row_adapters import AdapterNames
from .variant import with_call_kwargs, with_generate_kwargs


class LoraTuner:
    """The :class:`..tuner.Tuner` of LoRA adapters."""

    why_no_graph: str | None = None

    # ---------------------------------------------------------------- adapters

    def start(
        self,
        host: Any,
        model: nn.Module,
        adapter_name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        host.base_model = LoraModel(
            model,
            {adapter_name: config},
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def base(self, host: Any) -> nn.Module:
        return host.base_model.model

    def configs(self, host: Any) -> dict[str, Any]:
        return host.base_model.peft_config

    def set_configs(self, host: Any, configs: dict[str, Any]) -> None:
        host.base_model.peft_config = configs

    def active(self, host: Any) -> list[str]:
        return host.base_model.active_adapters

    def add(
        self,
        host: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        tuner = host.base_model
        state = tuner.__dict__
        was, state["_autocast_dtype"] = state["_autocast_dtype"], autocast_adapter_dtype
        try:
            tuner.inject_adapter(tuner.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            state["_autocast_dtype"] = was

    def activate(self, host: Any, adapter_name: str, inference_mode: bool) -> None:
        host.active_adapter = adapter_name
        host.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(
        self, host: Any, adapter_names: str | Sequence[str], requires_grad: bool
    ) -> None:
        host.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete(self, host: Any, adapter_name: str) -> None:
        host.base_model.delete_adapter(adapter_name)
        left = self.active(host)
        if left and host.active_adapter not in left:
            host.active_adapter = left[0]

    @contextmanager
    def disabled(self, host: Any) -> Iterator[None]:
        tuner = host.base_model
        states = {layer.disable_adapters for layer in tuner.adapter_layers()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. This is most likely unintentional. After exiting the disable_adapter "
                "context, all adapters will be enabled",
                stacklevel=5,
            )
        try:
            tuner.disable_adapter_layers()
            yield
        finally:
            if states != {True}:
                tuner.enable_adapter_layers()

    def supports_lora_conversion(self, host: Any, adapter_name: str) -> bool:
        return host.base_model.supports_lora_conversion(adapter_name)

    # ---------------------------------------------------------------- calls

    def forward(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = host.base_model.model
        ungroup_broken(model)
        kwargs = with_call_kwargs(host, kwargs)
        own = host.special_peft_forward_args
        if not any(kwargs.get(name) is not None for name in own):
            return model(*args, **{k: v for k, v in kwargs.items() if k not in own})
        with host._enable_peft_forward_hooks(*args, **kwargs):
            return model(*args, **{k: v for k, v in kwargs.items() if k not in own})

    def generate(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = with_generate_kwargs(host, args, kwargs)
        model = host.base_model.model
        how = {
            "num_beams": generation_setting(model, kwargs, "num_beams", *args[1:2]),
            "row_repeats": row_repeats(model, args[1:], kwargs),
        }
        own = host.special_peft_forward_args
        with host._enable_peft_forward_hooks(*args, **{**kwargs, **how}):
            return model.generate(*args, **{k: v for k, v in kwargs.items() if k not in own})

    def decoding(self, host: Any, ids: Any, names: Sequence[str] | None) -> Decoding:
        model = host.base_model
        ungroup_broken(model.model)
        kwargs = with_generate_kwargs(host, (), {"input_ids": ids, "adapter_names": names})
        told = {n for n in host.special_peft_forward_args if kwargs.get(n) is not None}
        if names is not None:
            if len(names) != len(ids):
                raise ValueError(
                    f"adapter_names has {len(names)} entries for {len(ids)} rows; allowed: one "
                    "for each"
                )
            model.check_names(names)
        if not host.has_active_enabled_adapter:
            told = set()
        if told <= {"adapter_names"}:
            context: Any = nullcontext
            if told:
                block = dict.fromkeys(
                    model.adapter_layers(), AdapterNames.of(kwargs["adapter_names"])
                )
                context = partial(handing, block)
            return Decoding(context, dict)
        reason = f"a step takes {', '.join(sorted(told))}"
        return Decoding(partial(host._enable_peft_forward_hooks, **kwargs), dict, 0, reason)

    def check_requests(self, host: Any, names: Sequence[str] | None) -> None:
        told = self.active(host) if names is None else names
        if names is not None:
            host.base_model.check_names(names)
        for name, layer in host.base_model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for used in told:
                variant = layer.lora_variant.get(used)
                if variant is not None and variant.call_kwargs:
                    raise NotImplementedError(
                        f"continuous batching would run {variant.name} of {used!r} without its "
                        f"{', '.join(variant.call_kwargs)}; generate() finds them"
                    )
            if names is None:
                continue
            if layer.layer_kind not in ("linear", "embedding", "parameter"):
                raise NotImplementedError(
                    f"requests with adapters of their own: {name} ({type(layer).__name__}) takes "
                    "the tokens of a sample together, which lie in one row here with others' tokens"
                )
            layer._check_named(names)

    def prepare_inputs(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return host.base_model.prepare_inputs_for_generation(*args, **kwargs)

    # ---------------------------------------------------------------- loading

    def loading(
        self, host: Any, adapter_name: str, is_trainable: bool
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def loaded(self, host: Any, adapter_name: str, is_trainable: bool, first: bool) -> None:
        if first:
            self.configs(host)[adapter_name].inference_mode = not is_trainable
        elif is_trainable:
            self.set_requires_grad(host, adapter_name, True)

    def active_state(self, host: Any) -> Any:
        return host.active_adapter, host.base_model.active_adapter

    def withdraw(self, host: Any, adapter_name: str, active: Any) -> None:
        host.delete_adapter(adapter_name)
        host.base_model.withdraw(adapter_name)
        host.active_adapter, host.base_model.active_adapter = active

    def take_down(self, host: Any, adapter_name: str, model: nn.Module, kept: bool) -> None:
        if not kept:
            host.base_model.withdraw(adapter_name)
            del model.peft_config
        elif host.base_model._unstack is not None:
            host.base_model._unstack()
