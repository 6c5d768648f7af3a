"""Checks of a ``LoraConfig`` when it is made: refusals, corrections and warnings."""

from __future__ import annotations

import warnings
from typing import Any

from ..utils.constants import ALL_EXPERTS_SHORTHAND
from ..utils.patterns import Pattern
from .lora_options import CordaConfig, EvaConfig
from .names import as_names, check_ints, check_names, check_pattern, is_int, is_number, shown

_FLAGS = (
    "fan_in_fan_out use_rslora lora_bias use_dora use_qalora ensure_weight_tying inference_mode"
).split()


def match_inits(config: Any) -> None:
    """Make ``init_lora_weights`` and its configurations consistent, with PEFT's warnings."""
    init = config.init_lora_weights
    if init == "loftq":
        if not config.loftq_config:
            raise ValueError(
                "`loftq_config` must be specified when `init_lora_weights` is 'loftq'."
            )
        if not isinstance(config.loftq_config, dict):
            config.loftq_config = vars(config.loftq_config)
    elif config.loftq_config:
        config.loftq_config = {}
        _ignored("loftq")
    elif init == "eva" and config.eva_config is None:
        _default("eva", "EVA")
        config.eva_config = EvaConfig()
    elif init != "eva" and config.eva_config is not None:
        _ignored("eva")
    elif init == "corda" and config.corda_config is None:
        _default("corda", "CorDA")
        config.corda_config = CordaConfig()
    elif init != "corda" and config.corda_config is not None:
        _ignored("corda")
    if config.lora_bias and init not in (True, False):
        raise ValueError(
            "The argument lora_bias=True is only supported with init_lora_weights=True or "
            f"False, got init_lora_weights={init} instead."
        )
    if config.lora_bias and config.use_dora:
        raise ValueError(
            "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
        )


def _ignored(name: str) -> None:
    warnings.warn(
        f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.",
        stacklevel=5,
    )


def _default(name: str, shown: str) -> None:
    warnings.warn(
        f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. Using default "
        f"{shown} config.",
        stacklevel=5,
    )


def warn_of_settings(config: Any) -> None:
    """Give HF PEFT's warnings about settings that should not be combined."""
    if config.alora_invocation_tokens is not None and config.task_type != "CAUSAL_LM":
        warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=4)
    if (
        config.use_rslora
        and (config.rank_pattern or config.alpha_pattern)
        and config.changes_base_weights
    ):
        # a file does not contain each layer's scaling, which the conversion would need
        warnings.warn(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
            "conversion of modified base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you "
            "won't be able to pass `path_initial_model_for_weight_conversion` to "
            "`save_pretrained` to restore the initial values of the base weights; if you "
            "intend to do this, please ensure not to use rslora or rank_pattern/alpha_pattern.",
            stacklevel=4,
        )


def check_types_of_names(config: Any) -> None:
    """Refuse wrong values in fields of names, indices or patterns.

    None and iterables are converted to the type of the field.
    """
    pattern = "a regular expression"
    check_names("target_modules", config.target_modules, one=f"{pattern} or 'all-linear'")
    check_names("exclude_modules", config.exclude_modules, one=pattern)
    check_names("layers_pattern", config.layers_pattern, one="one name")
    _check_parameters(config)
    config.modules_to_save = as_names("modules_to_save", config.modules_to_save)
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(config, name) or {})
        check_pattern(name, getattr(config, name))
    tokens: Any = config.trainable_token_indices
    layers: Any = config.layers_to_transform
    if isinstance(tokens, dict):
        check_names("trainable_token_indices", tokens)
        for key, indices in tokens.items():
            check_ints(f"trainable_token_indices[{key!r}]", indices)
    else:
        check_ints("trainable_token_indices", tokens)
        if isinstance(tokens, (set, frozenset)):  # the rows in a file need an order
            config.trainable_token_indices = sorted(tokens)
    check_ints("layers_to_transform", layers, one=True)
    if isinstance(layers, range):
        config.layers_to_transform = list(layers)
    for name in _FLAGS:
        if isinstance(getattr(config, name), str):  # any text would count as True, "no" too
            raise ValueError(f"`{name}` must be True or False, got {shown(getattr(config, name))}")


def _check_parameters(config: Any) -> None:
    """Refuse wrong values of ``target_parameters``, with HF PEFT's error for a string."""
    given = config.target_parameters
    if not isinstance(given, str):
        check_names("target_parameters", given)
        return
    if given.lower() != ALL_EXPERTS_SHORTHAND:
        raise TypeError(
            "`target_parameters` must be a list of strings or None. The one string that is "
            f"allowed is {ALL_EXPERTS_SHORTHAND!r}, got {given!r}."
        )
    config.target_parameters = ALL_EXPERTS_SHORTHAND


def check_values(config: Any) -> None:
    """Raise a ValueError, naming the field, for a value that is not possible."""
    ranks = {"r": config.r}
    ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}
    for name, rank in ranks.items():
        if not is_int(rank) or rank <= 0:
            raise ValueError(
                f"`{name}` should be a positive integer value but the value passed is "
                f"{rank if is_number(rank) else shown(rank)}"
            )
    for name, alpha in [("lora_alpha", config.lora_alpha)] + [
        (f"alpha_pattern[{k!r}]", v) for k, v in config.alpha_pattern.items()
    ]:
        if not is_number(alpha):
            raise ValueError(f"`{name}` should be a number but the value passed is {shown(alpha)}")
    p = config.lora_dropout
    if not is_number(p) or not 0.0 <= p < 1.0:
        given = p if is_number(p) else shown(p)
        raise ValueError(f"`lora_dropout` should be in [0, 1) but the value passed is {given}")
    if config.use_dora and config.megatron_config:
        raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        for pattern in (value,) if isinstance(value, str) else value or ():
            if isinstance(value, set):  # a set holds names and not patterns
                break
            Pattern(pattern, name)
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
        )
