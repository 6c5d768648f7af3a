"""``PeftModel``: an adapted model, used like its base model, that saves and loads its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from ..checkpoint.saving import AdapterFiles
from ..configs.base import PeftConfig
from ..configs.checks import checked
from ..tuners.checks import check_adapter_name, check_config, warn_of_prefix
from ..tuners.lora.variant import CALL_KWARGS
from ..tuners.modules_to_save import ModulesToSaveWrapper
from ..tuners.registry import tuner_for
from ..tuners.tuner import Tuner
from ..tuners.wrapped import Adapted, Wrapped
from ..utils.module_tree import checkpoints_activations
from ..utils.peft_types import PeftType, TaskType
from ..utils.zero3 import is_gathered_alone
from .batching import BatchedGeneration
from .prompt_names import PromptNames
from .status import AdapterStatus
from .two_libraries import apart, joined
from .wrapping import compare_under_zero, note_class, watch_wrappers


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


# {task: its class}; filled when the classes are defined, see tasks.py
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {}


class PeftModel(
    Wrapped, PromptNames, AdapterFiles, AdapterStatus, BatchedGeneration, PushToHubMixin, nn.Module
):
    """A base model with adapters in it or with prompts beside it.

    Args:
        model: the base model, changed in place.
        peft_config: the first adapter.
        adapter_name: its name; no dots.
        autocast_adapter_dtype: keep adapter weights in float32 under a float16 or bfloat16 model.
        low_cpu_mem_usage: make the adapter's weights on the meta device, to be loaded afterwards.

    Attributes:
        base_model: a tuner that holds the adapted model as ``base_model.model``. With prompts, the
            model itself.
        tuner: the object that keeps, calls, saves and loads adapters of this method.
        peft_config: {adapter name: configuration}.
        active_adapter: name of the adapter that calls use.

    Raises:
        ValueError, NotImplementedError: as :func:`peftkern.get_peft_model`; the model is then as it
            was.
    """

    # set by the task classes, see tasks.py
    forward_args: tuple[str, ...] = ()
    head_names: tuple[str, ...] = ()
    keeps_token_types = False
    pools_last_token = False
    labels_are_tokens = False
    prompt_in_encoder = False
    finds_invocations = False  # True: aLoRA's invocation tokens are searched in the input ids

    base_model: Any
    tuner: Tuner

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] = cls

    @classmethod
    def class_for(cls, task_type: Any) -> type[PeftModel]:
        """The class of a task; this class when the task has none."""
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type, cls)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        check_config(peft_config)
        self.active_adapter = adapter_name
        self.peft_type = PeftType(peft_config.peft_type)
        self._adapters_disabled = False
        self.tuner = tuner_for(self.peft_type)
        how = low_cpu_mem_usage, autocast_adapter_dtype
        with checked(peft_config):
            self._add_heads(peft_config)
            self.tuner.start(self, model, adapter_name, peft_config, *how)
        self._note_head_layer()
        if checkpoints_activations(model):
            self._prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1  # split products only reproduce the numbers of TP training

    # isinstance() reads this when type(model) does not match
    @property
    def __class__(self) -> type:
        return joined(type(self))

    @__class__.setter
    def __class__(self, cls: type) -> None:
        vars(object)["__class__"].__set__(self, apart(cls, type(self)))
        note_class(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self),), self.__dict__

    def _add_heads(self, config: Any) -> None:
        """Add the task's head to ``modules_to_save``: it trains in full with the adapter."""
        if self.head_names:
            have = list(config.modules_to_save or [])
            config.modules_to_save = have + [n for n in self.head_names if n not in have]

    def _note_head_layer(self) -> None:
        for name, module in self.get_base_model().named_children():
            if isinstance(module, ModulesToSaveWrapper):
                self.cls_layer_name = name
                break

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Make the embeddings' output of ``model`` require a gradient, and return the model."""
        self._prepare_model_for_gradient_checkpointing(model)
        return model

    @staticmethod
    def _prepare_model_for_gradient_checkpointing(model: Any) -> None:
        """Make the embeddings' output require a gradient.

        Otherwise checkpointed blocks would pass no gradient on.
        """
        if any(
            getattr(model, f"is_{how}", False)
            for how in ("loaded_in_8bit", "loaded_in_4bit", "quantized")
        ):
            return
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(
                lambda m, i, out: out.requires_grad_(True)
            )

    # ---------------------------------------------------------------- what it is

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.tuner.configs(self)

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.tuner.set_configs(self, value)

    @property
    def active_peft_config(self) -> Any:
        name = self.active_adapter
        return self.peft_config[name if isinstance(name, str) else name[0]]

    @property
    def active_adapters(self) -> list[str]:
        return self.tuner.active(self)

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Keywords of a call that are for adapters, those of variants included."""
        return {"adapter_names", *CALL_KWARGS}

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """All names in the adapters' ``modules_to_save``; None when there are none."""
        names = {
            n
            for c in self.peft_config.values()
            for n in (getattr(c, "modules_to_save", None) or ())
        }
        return names or None

    def get_base_model(self) -> nn.Module:
        """The model that was wrapped, with its adapter layers."""
        return self.tuner.base(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "tuner"):  # not built yet
                raise
            return getattr(self.base_model, name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True when :func:`peftkern.convert_to_lora` can convert the adapter to plain LoRA."""
        return self.tuner.supports_lora_conversion(self, adapter_name)

    # ---------------------------------------------------------------- calling it

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        asked = (kwargs.get(name) is not None for name in self.special_peft_forward_args)
        if not any(asked) or not self.has_active_enabled_adapter:
            yield
            return
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model through its active adapter.

        Positional arguments are those of the task (``forward_args``), keywords those of the base
        model. ``adapter_names``, a list of B names, selects an adapter for each row of the batch
        ("__base__" for none).
        """
        if is_gathered_alone(self):
            compare_under_zero(self)
        if self.forward_args:
            if len(args) > len(self.forward_args):
                raise TypeError(
                    f"forward takes at most {len(self.forward_args)} positional arguments"
                )
            for name, value in zip(self.forward_args, args, strict=False):
                if name in kwargs:
                    raise TypeError(f"forward got multiple values for argument {name!r}")
                if value is not None:
                    kwargs[name] = value
            args = ()
            kwargs.pop("task_ids", None)  # is for methods that peftkern does not have
        return self.tuner.forward(self, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, with the active adapter or one named for each row."""
        return self.tuner.generate(self, args, kwargs)

    # ---------------------------------------------------------------- adapters

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is the base model, except for biases that were trained."""
        was = self._adapters_disabled
        with self.tuner.disabled(self):
            try:
                self._adapters_disabled = True
                yield
            finally:
                self._adapters_disabled = was

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter; it is inactive and frozen until :meth:`set_adapter`.

        Raises:
            ValueError: the name is taken or contains a dot, the method is another one, or nothing
                matches.
            NotImplementedError: the configuration has a setting that is not built yet.

        After an error the model is as it was.
        """
        check_adapter_name(adapter_name, self.peft_config)
        check_config(peft_config)
        warn_of_prefix(adapter_name, peft_config.peft_type)
        if PeftType(peft_config.peft_type) != self.peft_type:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and "
                f"{PeftType(peft_config.peft_type)}."
            )
        with checked(peft_config):
            self._add_heads(peft_config)
            self.peft_config[adapter_name] = peft_config
            try:
                self.tuner.add(self, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
            except Exception:
                self.peft_config.pop(adapter_name, None)
                raise

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make ``adapter_name`` the active adapter; it trains unless ``inference_mode``.

        The other adapters do not train. ValueError for an unknown name.
        """
        if not isinstance(adapter_name, str) or adapter_name not in self.peft_config:
            raise ValueError(
                f"Adapter {adapter_name} not found. There are {sorted(self.peft_config)}."
            )
        self.tuner.activate(self, adapter_name, inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let the parameters of these adapters train, or freeze them; TypeError for prompts."""
        self.tuner.set_requires_grad(self, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first remaining one becomes active.

        Modules that train in full or by token switch to that one too.
        """
        self.tuner.delete(self, adapter_name)


watch_wrappers()

if TYPE_CHECKING:
    _: type[Adapted] = PeftModel  # for the type checker: PeftModel has all that mixins use
