"""Conversion of an adapter to LoRA of a chosen rank: the best approximation of each update."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ...configs.lora import LoraConfig
from ...files.atomic import replaced_together, write_atomically
from ...utils.constants import SAFETENSORS_WEIGHTS_NAME
from ...utils.peft_types import PeftType
from ..base_layer import BaseTunerLayer
from ..modules_to_save import ModulesToSaveWrapper
from .restore import at_least_float32

PREFIX = "base_model.model."


def _rank_for(s: Tensor, share: float) -> int:
    """The smallest k for which the k largest singular values have at least ``share`` of Σ s².

    ``s`` holds the singular values, largest first.
    """
    energy = s.square().cumsum(0)
    return int(torch.searchsorted(energy, share * energy[-1])) + 1


def _factors(delta: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] from the truncated SVD of an update.

    Args:
        delta: the update [N, K], at least float32.
        rank: r, or the share of Σ s² to keep.
    """
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    r = rank if isinstance(rank, int) else _rank_for(s, rank)
    if r > len(s):
        raise ValueError(
            f"The chosen rank {r} is larger than the weight shape ({len(s)}), please choose a "
            "lower rank."
        )
    return vh[:r], u[:, :r] * s[:r]


@torch.no_grad()
def _update_of(layer: Any, adapter_name: str) -> tuple[Tensor, torch.dtype]:
    """(the update [N, K] of an adapter in a layer, the adapter's dtype)."""
    delta = layer.get_delta_weight(adapter_name)
    dtype = delta.dtype
    if hasattr(layer, "_delta_weight"):
        delta = layer._delta_weight(adapter_name)  # without rounding to the adapter's dtype
        if adapter_name in getattr(layer, "lora_variant", ()):
            base = at_least_float32(layer._unmerged_weight())
            delta = layer._merged_weight(adapter_name, base) - base
    delta = at_least_float32(delta)
    return (delta.T if getattr(layer, "fan_in_fan_out", False) else delta), dtype


def _check(model: nn.Module, rank: int | float, adapter_name: str) -> Any:
    """Check everything; returns the adapter's configuration, None for a model without one."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but "
            f"got {rank}."
        )
    if rank <= 0:
        raise ValueError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    unfit = {repr(type(m)) for m in layers if not m.supports_lora_conversion(adapter_name)}
    if unfit:
        raise TypeError(
            "Some module types on this model do not support LoRA conversion: "
            f"{', '.join(sorted(unfit))}."
        )
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    configs: Any = getattr(model, "peft_config", None) or {}
    if configs and adapter_name not in configs:
        raise ValueError(f"no adapter named {adapter_name!r}; there are {sorted(configs)}")
    config = configs.get(adapter_name)
    if config is None:
        return None
    if config.peft_type == PeftType.LORA:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically "
            "no need for that.",
            stacklevel=3,
        )
    for name in ("bias", "lora_bias"):
        if (value := getattr(config, name, None)) not in (None, False, "none"):
            raise ValueError(
                f"The adapter's config sets {name}={value}, this is not supported right now."
            )
    return config


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter to LoRA: the truncated SVD of each linear layer's update ΔW.

    This works for adapters that add to the weights of linear layers
    (``supports_lora_conversion``), also to change the rank of a LoRA adapter. The new tensors
    include the scaling, so the new scaling is 1 everywhere.

    Args:
        model: with adapter layers in it.
        rank: an int: the rank of every layer. A float in (0, 1]: the share of Σ s² (s are the
            singular values of ΔW) that each layer keeps, which decides its rank.
        adapter_name: the adapter to convert.
        progressbar: show progress.
        compile_kwargs: when given, compile each layer's conversion by ``torch.compile`` with these.

    Returns:
        (configuration, {name on disk: tensor}).

    Raises:
        TypeError: a layer's adapter is not an update of a weight, or no layer is adapted.
        ValueError: an invalid rank, an unknown adapter, a rank above a layer's width, or trained
            biases.
    """
    config = _check(model, rank, adapter_name)
    r = rank if isinstance(rank, int) else 1  # for a share, rank_pattern names every layer's rank
    how: dict[str, Any] = {"target_modules": []}
    if config is not None:
        how = {
            "target_modules": copy.copy(config.target_modules),
            "base_model_name_or_path": config.base_model_name_or_path,
            "modules_to_save": copy.copy(getattr(config, "modules_to_save", None)),
            "layers_pattern": getattr(config, "layers_pattern", None),
            "layers_to_transform": getattr(config, "layers_to_transform", None),
        }
    lora = LoraConfig(r=r, lora_alpha=r, exclude_modules=set(), **how)
    factors = _factors if compile_kwargs is None else torch.compile(_factors, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    for key, layer in tqdm(
        list(model.named_modules()), disable=not progressbar, desc="Converting to LoRA"
    ):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if adapter_name not in layer._get_available_adapters():
            continue
        delta, dtype = _update_of(layer, adapter_name)
        A, B = factors(delta, rank)
        name = key.removeprefix(PREFIX)
        by_set = isinstance(lora.target_modules, set)
        if len(A) != r or not by_set:
            lora.rank_pattern[name] = lora.alpha_pattern[name] = len(A)
        if by_set and (config is None or len(A) == r):
            lora.target_modules.add(name)  # type: ignore[union-attr]
        tensors[f"{key}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = B.to(dtype).contiguous()
    if not tensors:
        raise ValueError(
            f"No layer has weights of {adapter_name!r}, so there is nothing to convert."
        )
    for key, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copied = module.modules_to_save[adapter_name].state_dict()
            tensors.update({f"{key}.{name}": value.clone() for name, value in copied.items()})
    return lora, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert as :func:`convert_to_lora` and save the result in the folder ``path``.

    The folder is made when it is missing.
    """
    from safetensors.torch import save_file

    lora, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    os.makedirs(path, exist_ok=True)
    with replaced_together(path) as staged:
        write_atomically(
            os.path.join(staged, SAFETENSORS_WEIGHTS_NAME),
            lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}),
        )
        lora.save_pretrained(staged)
