"""``PeftMixedModel``: a model with several adapters active at a time."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .configs.base import PeftConfig
from .model import PeftModel
from .tuners.checks import check_config
from .tuners.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from .utils.peft_types import PeftType

COMPATIBLE_TUNER_TYPES = tuple(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)


class PeftMixedModel(PeftModel):
    """What ``get_peft_model(model, config, mixed=True)`` makes: adapters that are active together.

    Of peftkern's methods LoRA alone adapts layers, so they are LoRA adapters, of any variants and
    ranks; HF PEFT's also mixes them with LoHa, LoKr, AdaLoRA and OFT. :meth:`set_adapter` and
    :meth:`delete_adapter` take lists of names. Otherwise it is a :class:`PeftModel` without a task,
    and saves and loads each adapter as one.

    Args:
        model: the base model, changed in place.
        peft_config: the first adapter.
        adapter_name: its name; no dots.
        autocast_adapter_dtype: keep adapter weights in float32 under a float16 or bfloat16 model;
            as in HF PEFT not that of the first.
        low_cpu_mem_usage: as of :class:`PeftModel`.

    Raises:
        ValueError: a method that cannot be mixed (prompts), and as :class:`PeftModel`.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        _check_mixes(peft_config)
        how = autocast_adapter_dtype, low_cpu_mem_usage
        super().__init__(model, peft_config, adapter_name, *how)

    @classmethod
    def class_for(cls, task_type: Any) -> type[PeftModel]:
        """This class, whatever the task."""
        return cls

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter; it is inactive and frozen until :meth:`set_adapter`."""
        _check_mixes(peft_config)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter or several active; they train unless ``inference_mode``.

        Their updates are added in the order in which the adapters were added to the model.
        ValueError for an unknown name.
        """
        self.tuner.activate(self, self._known(adapter_name), inference_mode)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter or several; ValueError for an unknown name."""
        for name in self._known(adapter_name):
            super().delete_adapter(name)
        self.active_adapter = self.base_model.active_adapters

    def _known(self, names: str | list[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        unknown = sorted(set(names).difference(self.peft_config))
        if unknown:
            raise ValueError(
                f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}"
            )
        return names

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, as in HF PEFT: adapters of several methods have no common form."""
        raise NotImplementedError(
            f"Weighted adapters are not supported for {type(self).__name__} (yet)."
        )

    def get_layer_status(self) -> NoReturn:
        """Not supported, as in HF PEFT."""
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> NoReturn:
        """Not supported, as in HF PEFT."""
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")


def _check_mixes(config: Any) -> None:
    check_config(config)
    if PeftType(config.peft_type) not in COMPATIBLE_TUNER_TYPES:
        names = ", ".join(method.value for method in COMPATIBLE_TUNER_TYPES)
        raise ValueError(
            f"The provided `peft_type` '{PeftType(config.peft_type).value}' is not compatible with "
            f"the `PeftMixedModel`. Compatible types are: {names}"
        )
