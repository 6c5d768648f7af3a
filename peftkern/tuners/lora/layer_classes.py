"""The choice of a LoRA layer for a base layer, and the checks before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...configs.lora import LoraConfig
from ...utils.constants import SEQ_CLS_HEAD_NAMES
from ...utils.module_tree import get_submodules
from ...utils.patterns import ending
from ...utils.places import ends_with_words
from ...utils.warning import PeftWarning
from ..base_layer import BaseTunerLayer
from ..modules_to_save import CONTAINERS, ModulesToSaveWrapper
from . import inits
from .attention import MultiheadAttention, check_attention
from .base import LoraLayer
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear
from .linear_kinds import is_linear_kind
from .own_forward import own_forward
from .variant import table_of, variant_class

# names of heads that tasks put into modules_to_save whether a model has such a module or not
HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# tried in this order
LAYERS: dict[type[nn.Module], type[LoraLayer]] = {
    Conv1D: Linear,
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Conv1d: Conv1d,
    nn.MultiheadAttention: MultiheadAttention,
}


def layer_class(base: nn.Module) -> Callable[[nn.Module], LoraLayer]:
    """The callable that makes the LoRA layer for a base layer.

    Raises:
        ValueError: the base layer's class cannot be adapted.
    """
    cls = _layer_class(base)
    if cls is not None:
        return partial(cls, fan_in_fan_out=True) if isinstance(base, Conv1D) else cls
    raise ValueError(
        f"Target module {base} is not supported. Currently, only the following modules are "
        "supported: `torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
        "`torch.nn.Conv3d`, `transformers.pytorch_utils.Conv1D`, `torch.nn.MultiheadAttention.`."
    )


def _layer_class(base: nn.Module) -> type[LoraLayer] | None:
    for kind, cls in LAYERS.items():
        if isinstance(base, kind):
            return cls
    return Linear if is_linear_kind(base) else None


def base_of(module: Any) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def custom_class(module: nn.Module, config: LoraConfig) -> type[nn.Module] | None:
    """The user's LoRA layer class for a base layer, or None.

    See ``LoraConfig._register_custom_module``.
    """
    for kind, cls in (config._custom_modules or {}).items():
        if isinstance(base_of(module), kind):
            return cls
    return None


def check(key: str, module: nn.Module, r: int, config: LoraConfig) -> None:
    """Refuse an adapter that the layer ``module`` cannot have, mostly in HF PEFT's words.

    Raises:
        ValueError: ``lora_bias`` on an embedding; a rank that is no multiple of a convolution's
            groups; an attention, a variant or an initialisation that is not possible.
        TypeError: a dtype that the initialisation or the variant does not support.
    """
    base: Any = base_of(module)
    kind = type(base).__name__
    if isinstance(base, nn.Embedding) and config.lora_bias:
        raise ValueError(f"lora_bias=True is not supported for Embedding: `{key}`.")
    if isinstance(base, CONVOLUTIONS) and r % base.groups:
        raise ValueError(
            f"Targeting a {kind} with groups={base.groups} and rank {r}. Currently, support is "
            "limited to conv layers where the rank is divisible by groups. Either choose a "
            "different rank or do not target this specific layer."
        )
    if isinstance(base, nn.MultiheadAttention):
        check_attention(base, config)
    if isinstance(module, LoraLayer):
        table, layer_kind = module.lora_variants, module.layer_kind
    else:
        cls: Any = _layer_class(base)
        table, layer_kind = table_of(cls.layer_kind), cls.layer_kind
    variant = variant_class(table, layer_kind, config)
    if variant is not None:
        variant.check(key, base, r, config)
    inits.check(key, base, r, config)


def warn(module: nn.Module, config: LoraConfig) -> None:
    """Give HF PEFT's warnings about a layer that gets an adapter, and one about its forward."""
    base: Any = base_of(module)
    if config.lora_bias and getattr(base, "bias", None) is None:
        warnings.warn(
            "`lora_bias=True` was passed but the targeted layer of type "
            f"{type(base).__name__} has no bias. This means that merging LoRA weights won't be "
            "possible.",
            PeftWarning,
            stacklevel=5,
        )
    if config.changes_base_weights and (said := own_forward(base)) is not None:
        warnings.warn(
            f"init_lora_weights={config.init_lora_weights!r} takes the adapter's start out of the "
            f"weight of {said}: outputs change unless both compute the same.",
            PeftWarning,
            stacklevel=5,
        )
    if isinstance(base, CONVOLUTIONS) and base.groups > 1 and module is base:
        warnings.warn(
            "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.",
            stacklevel=5,
        )


def warn_of_changed_base(configs: list[Any]) -> None:
    """Give HF PEFT's warning when one of several adapters changes the weights that all share."""
    names = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA", "lora_ga": "LoRA-GA"}
    inits = [str(getattr(c, "init_name", "")).partition("_niter_")[0] for c in configs]
    found = [shown for name, shown in names.items() if name in inits]
    if len(configs) > 1 and found:
        warnings.warn(
            f"{found[0]} changes the base weights of the model and should thus not be used with "
            f"other adapters. Consider converting the {found[0]} adapter into a normal LoRA "
            "adapter: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.",
            stacklevel=5,
        )


def check_saved(
    model: nn.Module, config: LoraConfig, name: str, sites: list[Any], saved: list[str]
) -> None:
    """Raise for modules of ``modules_to_save`` that cannot be trained in full.

    Args:
        model: the base model.
        config: the new adapter's configuration.
        name: the new adapter's name.
        sites: (name, module, ...) of each layer that gets the adapter.
        saved: names of the modules that ``modules_to_save`` matches.

    Raises:
        TypeError: one of them is an adapter layer or a container, or inside a layer of ``sites``.
        ValueError: a name in ``modules_to_save`` matches only parts of adapter layers.
    """
    for key in saved:
        _, module, _ = get_submodules(model, key)
        if isinstance(module, (BaseTunerLayer, *CONTAINERS)):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(module)} (`{key}`)"
            )
    within = next((k for k in saved for key, *_ in sites if k.startswith(f"{key}.")), None)
    if within is not None:
        raise TypeError(
            f"modules_to_save cannot be applied to `{within}`: it is a part of a layer that "
            "gets an adapter"
        )
    # parts of adapter layers are never meant: an error when a name matches nothing else
    parts = ("base_layer", "lora_dropout", "lora_A", "lora_B", f"lora_A.{name}")
    for wanted in config.modules_to_save or ():
        if wanted in HEADS or any(ends_with_words(key, wanted) for key in saved):
            continue
        inside = [f"{key}.{part}" for key, *_ in sites for part in parts]
        inside += [key for key, _ in model.named_modules() if key]
        if any(ends_with_words(key, wanted) for key in inside):
            raise ValueError(
                f"You are trying to target a module with {ModulesToSaveWrapper} that is a "
                f"child of {Linear}. This is almost certainly not the intended behavior. "
                f"Please ensure that the adapter name, '{name}', does not conflict with any of "
                f"the targeted modules. (`modules_to_save` has {wanted!r}.)"
            )


def check_patterns(config: LoraConfig, keys: list[str]) -> None:
    """Warn of patterns for ranks and alphas that match none of ``keys``, the adapted modules."""
    for attribute in ("rank_pattern", "alpha_pattern"):
        unused = sorted(
            pattern
            for pattern in getattr(config, attribute)
            if not any(map(ending(pattern, attribute).match, keys))
        )
        if unused:
            warnings.warn(
                f"The following {attribute} keys did not match any targeted module and were "
                f"ignored: {unused}.",
                RuntimeWarning,
                stacklevel=4,
            )


def match_fan_in_fan_out(config: LoraConfig, modules: list[nn.Module]) -> None:
    """Set ``fan_in_fan_out`` to fit the layers' classes, with HF PEFT's warning when it changes."""
    for module in modules:
        linear = isinstance(module, nn.Linear) or is_linear_kind(module)
        if linear and config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False.",
                stacklevel=4,
            )
            config.fan_in_fan_out = False
        elif hasattr(module, "nf") and not config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting "
                "fan_in_fan_out to True.",
                stacklevel=4,
            )
            config.fan_in_fan_out = True


def add_adapter(
    layer: Any,
    name: str,
    key: str,
    r: int,
    alpha: float,
    config: LoraConfig,
    autocast_dtype: bool,
    meta: bool,
    trainable: bool,
) -> None:
    """Give a LoRA layer one more adapter; a user's class is called as HF PEFT calls it."""
    if type(layer).update_layer.__module__.startswith("peftkern."):
        layer.update_layer(name, r, alpha, config, autocast_dtype, meta, trainable, target_name=key)
    else:
        layer.update_layer(name, r, lora_alpha=alpha, target_name=key, config=config)


def make_custom(
    cls: Any,
    base: nn.Module,
    name: str,
    key: str,
    r: int,
    alpha: float,
    config: LoraConfig,
    **how: Any,
) -> Any:
    """A user's LoRA layer around ``base`` with its first adapter, made as HF PEFT makes it.

    ``how`` are the further arguments of peftkern's own layers.
    """
    return cls(
        base,
        name,
        config=config,
        r=r,
        lora_alpha=alpha,
        target_name=key,
        loaded_in_8bit=False,
        loaded_in_4bit=False,
        ephemeral_gpu_offload=config.runtime_config.ephemeral_gpu_offload,
        parameter_name=None,
        tied_adapter={},
        **how,
    )
