"""Functions on a tree of modules: names, parents, parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .patterns import ending, whole
from .private import NO_SPLIT


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module named ``key``."""
    parent_name, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_name)
    return parent, model.get_submodule(key), name


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """``list(model.parameters())``, faster, as it does not make the names."""
    found: dict[int, nn.Parameter] = {}
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        stack += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def training_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that are in training mode."""
    found, stack = [], [model]
    while stack:
        module = stack.pop()
        if module.training:
            found.append(module)
        stack += [m for m in module._modules.values() if m is not None]
    return found


def checkpoints_activations(model: Any) -> bool:
    """True when the model recomputes activations in its backward, or does not say if it does."""
    # transformers renamed the property in 5.x; wrappers pass it on
    found = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", True) if found is None else found)


def own_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """``module.parameters()``, faster for modules without children, as most of adapters are."""
    if module._modules:
        return module.parameters()
    return [p for p in module._parameters.values() if p is not None]


def set_layer_requires_grad(layer: nn.Module | Tensor, requires_grad: bool) -> None:
    """Set ``requires_grad`` on a tensor or all parameters of a module.

    Tensors that are not leaves (FSDP's views) are skipped.
    """
    tensors: Iterable[Tensor | None]
    if isinstance(layer, Tensor):
        tensors = (layer,)
    else:
        tensors = layer.parameters() if layer._modules else layer._parameters.values()
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad != requires_grad and tensor.is_leaf:
            tensor.requires_grad_(requires_grad)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The match of a regular expression with a whole module name, or None.

    Raises:
        ValueError: the pattern takes too long, or is no regular expression.
    """
    found: re.Match[str] | None = whole(target_pattern, "target_modules").fullmatch(key)
    return found


def get_pattern_key(
    patterns: Iterable[str], key: str, field: str = "rank_pattern or alpha_pattern"
) -> str:
    """The first of ``patterns`` that matches ``key``, or ``key`` when none does.

    Patterns are names or regular expressions, for the whole of ``key`` or its end from a dot on.
    ``field`` is their setting, for errors.

    Raises:
        ValueError: a pattern takes too long, or is no regular expression.
    """
    for pattern in patterns:
        if ending(pattern, field).match(key):
            return pattern
    return key


def is_valid_match(key: str, target_key: str) -> bool:
    """True when ``target_key`` is ``key`` or consists of its last parts."""
    return key == target_key or key.endswith("." + target_key)


def input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The name of the module that ``model.get_input_embeddings()`` returns, or ``default``."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    wanted = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is wanted), default)


def batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of rows of the given input; ValueError when neither is given."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """``weight``, or with ``fan_in_fan_out`` its transpose; a parameter stays a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """(device, address, bytes) of a tensor's storage, equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter whose name contains ``adapter_name``."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad = False


def no_split_modules(model: Any) -> set[str]:
    """Names of the classes whose modules a device map keeps on one device."""
    return set(getattr(model, NO_SPLIT, None) or ())
