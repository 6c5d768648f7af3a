"""From names to classes: configurations, tuners, and the functions that start from a
configuration."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig, build_config
from .mixed_model import INSTEAD
from .tuners._buffer_dict import BufferDict
from .tuners.lora import LoraConfig, LoraModel
from .tuners.p_tuning import PromptEncoder, PromptEncoderConfig
from .tuners.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig
from .tuners.tuners_utils import BaseTunerLayer, adapter_modules
from .utils.peft_types import PeftType

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
    PeftType.PROMPT_TUNING: PromptTuningConfig,
    PeftType.P_TUNING: PromptEncoderConfig,
}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, Any] = {  # a tuner, or an encoder of prompts
    PeftType.LORA: LoraModel,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, Any] = {PeftType.LORA: LoraModel}


# what adapters stand in, by name: names that these have already are taken
_STORES = (nn.ModuleDict(), nn.ParameterDict(), BufferDict({}))


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dict describes, of the class that its ``peft_type`` names.

    Keys of other PEFT versions are dropped: silently when None, with a warning that names them
    otherwise.

    Raises:
        ValueError: no ``peft_type``, or one that peftkern does not have.
    """
    from .config import config_class_for

    if not config_dict.get("peft_type"):
        raise ValueError(f"`config_dict` needs the key 'peft_type'; it has {sorted(config_dict)}")
    return build_config(config_class_for(config_dict["peft_type"]), config_dict, "get_peft_config")


def check_adapter_name(adapter_name: Any, existing: Any = ()) -> None:
    """Raise a ValueError for a name that cannot be used in parameter names, or that is taken."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"`adapter_name` must be a non-empty string, got {adapter_name!r}")
    if "." in adapter_name or "/" in adapter_name or "\\" in adapter_name:
        raise ValueError(
            "`adapter_name` must not hold a dot or a slash (it becomes part of parameter and "
            f"folder names), got {adapter_name!r}"
        )
    if any(hasattr(store, adapter_name) for store in _STORES):
        raise ValueError(
            f"`adapter_name` must not be the name of a method or an attribute of torch's modules, "
            f"got {adapter_name!r}"
        )
    if adapter_name in existing:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")


def check_config(peft_config: Any) -> None:
    """Raise a TypeError for what is no configuration of peftkern's, such as one of HF PEFT's."""
    if isinstance(peft_config, PeftConfig):
        return
    kind = type(peft_config)
    name = f"{kind.__module__}.{kind.__qualname__}"
    hint = f"; import {kind.__name__} from peftkern" if name.startswith("peft.") else ""
    raise TypeError(f"`peft_config` must be a configuration of peftkern's, got {name}{hint}")


def warn_of_prefix(adapter_name: str, peft_type: Any) -> None:
    """A name that the method's prefix begins with ("lora" of "lora_"): here it is a name as any
    other, but code that looks for ".lora" in the names of parameters, as older releases of HF PEFT
    do, finds every adapter. A part from elsewhere in the prefix ("a") is in nobody's way."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(peft_type))
    if prefix and prefix.startswith(adapter_name):
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. Code "
            f"that looks for '.{adapter_name}' in names of parameters finds all adapters.",
            stacklevel=3,
        )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put adapter layers into ``model`` in place and return it, without a :class:`PeftModel` around
    it.

    The adapter becomes the active one; its weights have the dtype of the layers that they adapt.

    Args:
        peft_config: a configuration of a method that adapts layers (LoRA).
        model: any module.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: adapt the modules that have tensors in here, whatever ``target_modules`` says;
            only names are read. A RuntimeWarning tells the difference.

    Raises:
        ValueError, NotImplementedError: as :func:`get_peft_model`.
    """
    check_adapter_name(adapter_name)
    check_config(peft_config)
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
) -> Any:
    """Adapt ``model`` in place and wrap it in the :class:`PeftModel` of its task.

    Args:
        model: a transformers model, or any module when the configuration has no task type.
        peft_config: the adapter.
        adapter_name: its name; no dots.
        mixed: not supported, must be False.
        autocast_adapter_dtype: keep adapter weights in float32 under a float16 or bfloat16 model.
        revision: the base model's revision, noted in the configuration.
        low_cpu_mem_usage: make the adapter's weights on the meta device, to be loaded afterwards.

    Raises:
        TypeError: ``peft_config`` is not one of peftkern's.
        ValueError: a bad name, no match for the targets, or a target that cannot be adapted.
        NotImplementedError: the configuration asks for something not built yet.
        Either way the model is left as it was.
    """
    from .peft_model import PeftModel
    from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    if mixed:
        raise NotImplementedError(f"mixed=True: {INSTEAD}")
    check_adapter_name(adapter_name)
    check_config(peft_config)
    peft_config.check_supported()
    old_name = peft_config.base_model_name_or_path
    # a model made from a config has an empty name, which is no name
    new_name = model.__dict__.get("name_or_path") or None
    peft_config.base_model_name_or_path = new_name
    if old_name is not None and old_name != new_name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to "
            f"'{new_name}'. Please ensure that the correct base model is loaded when loading this "
            "checkpoint.",
            stacklevel=2,
        )
    if not peft_config.is_prompt_learning and any(
        isinstance(module, BaseTunerLayer) for module in adapter_modules(model)
    ):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload "
            "the model with "
            "a different config, make sure to call `.unload()` before.",
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
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
