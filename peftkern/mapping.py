"""Functions that make adapters from configurations, at HF PEFT's address of them and its tables."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from .configs.base import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    build_config,
    config_class_for,
)
from .configs.checks import checked
from .mixed_model import PeftMixedModel
from .model import PeftModel
from .tuners.base_layer import BaseTunerLayer, adapter_modules
from .tuners.checks import check_adapter_name, check_config, check_model, warn_of_prefix
from .tuners.registry import (
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from .utils.peft_types import PeftType

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration from a dict, of the class that its ``peft_type`` names.

    Keys of other PEFT versions are dropped; a warning names those whose value is not None.

    Raises:
        ValueError: no ``peft_type``, or one that peftkern does not have.
    """
    if not config_dict.get("peft_type"):
        raise ValueError(f"`config_dict` needs the key 'peft_type'; it has {sorted(config_dict)}")
    return build_config(config_class_for(config_dict["peft_type"]), config_dict, "get_peft_config")


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put adapter layers into ``model``, in place, and return it without a :class:`PeftModel`.

    The adapter becomes the active one; its weights have the dtype of the layers that they adapt.

    Args:
        peft_config: a configuration of a method that adapts layers (LoRA).
        model: any module.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: adapt the modules that have tensors in it, and not ``target_modules``. Only
            names are read. A RuntimeWarning lists the differences.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`get_peft_model`.
    """
    check_adapter_name(adapter_name)
    check_config(peft_config)
    check_model(model)
    if peft_config.is_prompt_learning:
        raise ValueError(
            "`create_and_replace` does not support prompt learning, adaption prompt and shadow yet."
        )
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_config.peft_type)]
    return tuner_cls(
        model,
        peft_config,
        adapter_name,
        low_cpu_mem_usage=low_cpu_mem_usage,
        state_dict=state_dict,
        training=model.training,
    ).model


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt ``model`` in place and wrap it in the :class:`PeftModel` of its task.

    Args:
        model: a transformers model, or any module when the configuration has no task type.
        peft_config: the adapter's configuration.
        adapter_name: its name, without dots.
        mixed: make a :class:`PeftMixedModel`, whose adapters may be active together.
        autocast_adapter_dtype: keep adapter weights in float32 under a float16 or bfloat16 model.
        revision: the base model's revision, noted in the configuration.
        low_cpu_mem_usage: make the adapter's weights on the meta device, to be loaded afterwards.

    Raises:
        TypeError: ``peft_config`` is not one of peftkern's, or ``model`` is no module.
        ValueError: a bad name, no match for the targets, or a target that cannot be adapted.
        NotImplementedError: the configuration has a setting that is not built yet.

    After an error the model is as it was.
    """
    check_adapter_name(adapter_name)
    check_config(peft_config)
    check_model(model)
    with checked(peft_config):
        old_name = peft_config.base_model_name_or_path
        # a model that was made from a config has the name "", which counts as none
        new_name = model.__dict__.get("name_or_path") or None
        peft_config.base_model_name_or_path = new_name
        if old_name is not None and old_name != new_name:
            warnings.warn(
                f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to "
                f"'{new_name}'. Please ensure that the correct base model is loaded when loading "
                "this checkpoint.",
                stacklevel=2,
            )
        if not peft_config.is_prompt_learning and any(
            isinstance(module, BaseTunerLayer) for module in adapter_modules(model)
        ):
            warnings.warn(
                "You are trying to modify a model with PEFT for a second time. If you want to "
                "reload the model with a different config, make sure to call `.unload()` before.",
                stacklevel=2,
            )
        if revision is not None:
            if peft_config.revision not in (None, revision):
                warnings.warn(
                    f"peft config has already set base model revision to {peft_config.revision}, "
                    f"overwriting with revision {revision}",
                    stacklevel=2,
                )
            peft_config.revision = revision
        warn_of_prefix(adapter_name, peft_config.peft_type)
        if mixed:  # as in HF PEFT the other arguments are not its
            return PeftMixedModel(model, peft_config, adapter_name)
        cls = PeftModel.class_for(peft_config.task_type)
        return cls(
            model,
            peft_config,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
