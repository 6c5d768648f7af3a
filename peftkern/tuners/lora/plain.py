"""Conversion to plain LoRA of adapters whose start changed the base weights (PiSSA, OLoRA, …).

Such a start subtracts s B₀ A₀ from W: W = R + s B₀ A₀. After training the layer computes with
R + s B A = W + s (B A - B₀ A₀). So the adapter with A' = [A; A₀], B' = [B, -B₀] and the same s
gives the same model on the unchanged W.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...configs.lora import LoraConfig
from .variant import variants_asked

_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
# beginnings of init_lora_weights for which the difference to the start is the whole update
_STARTS = ("pissa", "corda", "olora", "lora_ga", "true")


def subtract_start(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter of twice the rank: update of ``tensors`` minus that of ``start``.

    Tensors that are no part of an update (modules trained in full) stay as they are.

    Args:
        tensors: the adapter after training, by names on disk.
        start: the adapter before training, by the same names.

    Raises:
        ValueError: ``start`` lacks a tensor, or has one of another shape.
    """
    found = {}
    for key, value in tensors.items():
        factor = _FACTOR.search(key)
        if factor is None and not key.endswith(".lora_B.bias"):
            found[key] = value
            continue
        first = start.get(key)
        if first is None or first.shape != value.shape:
            have = "nothing" if first is None else list(first.shape)
            raise ValueError(
                f"the initial adapter has {have} for `{key}`, and the trained one "
                f"{list(value.shape)}: it is not what this adapter started from"
            )
        first = first.to(value)
        if factor is None:
            found[key] = value - first
        elif factor[1] == "A":
            found[key] = torch.cat([value, first], 0)
        else:
            found[key] = torch.cat([value, -first], 1)
    return found


def as_plain_lora(
    config: LoraConfig, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, tensors) of a plain LoRA adapter that gives the same model.

    It is for the unchanged base model; the given adapter is for the one that its start changed.

    Args:
        config: the adapter's configuration; a changed copy is returned.
        tensors: its tensors by names on disk.
        start: its first tensors by names on disk.

    Raises:
        ValueError: a scaling that a configuration of twice the rank cannot express, a variant whose
            adapters cannot be stacked (DoRA, KaSA, BD-LoRA, aLoRA), ``target_parameters``, or a
            start that is not this adapter's.
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
            "supported when using `rank_pattern` or `alpha_pattern` at the same time as "
            "`use_rslora=True`."
        )
    for variant in variants_asked(config):
        if not variant.stacks:
            asked = getattr(config, variant.setting)
            shown = f"{variant.setting}=True" if asked is True else variant.setting
            raise ValueError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
                f"supported with `{shown}`: the difference of two {variant.name} adapters is none "
                "of twice the rank."
            )
    if config.target_parameters:
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
            "supported with `target_parameters`: factors of several experts share one tensor."
        )
    if not str(config.init_lora_weights).lower().startswith(_STARTS):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a "
            "PiSSA/CorDA/OLoRA/LoRA-GA adapter to a LoRA adapter",
            stacklevel=3,
        )
    plain = copy.deepcopy(config)
    for variant in variants_asked(config):
        if variant().supports_lora_conversion():  # only B A is needed after training
            field = next(f for f in dataclasses.fields(config) if f.name == variant.setting)
            setattr(plain, field.name, field.default)
            stores = [f".{name}" for name in (*variant.weight_stores, *variant.value_stores)]
            tensors = {k: t for k, t in tensors.items() if not any(s in k for s in stores)}
    plain.init_lora_weights = True
    plain.r *= 2
    plain.lora_alpha *= 2**0.5 if config.use_rslora else 2
    plain.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
    plain.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
    return plain, subtract_start(tensors, start)


class Starts:
    """The part of :class:`LoraModel` that subtracts an adapter's start."""

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """The tensors of a plain LoRA adapter of twice the rank: the given ones minus their start.

        ``output_state_dict`` has the tensors by names on disk. Their start is in the model, as the
        adapter ``adapter_name``, or in ``kwargs["state_dict"]``, by names in this module.
        """
        module: Any = self
        if adapter_name.startswith("pissa") and any(
            p.dtype not in (torch.float32, torch.float16, torch.bfloat16)
            for p in module.model.parameters()
        ):
            warnings.warn(
                "Note that Quant(W_res) + AB != Quant(W) + \\Delta(AB): on quantised base weights "
                "the converted adapter may be off. There, keep the PiSSA adapter on Quant(W_res).",
                stacklevel=2,
            )
        state = (kwargs or {}).get("state_dict") or module.state_dict()
        inner = re.compile(rf"\.{re.escape(adapter_name)}(?=\.weight$|\.bias$|$)")
        start = {
            f"base_model.{inner.sub('', key)}": value
            for key, value in state.items()
            if ".lora_" in key and inner.search(key)
        }
        return subtract_start(output_state_dict, start)
