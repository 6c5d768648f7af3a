"""Quantised experts as the dense module of the model's own family."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops.bases.experts import FoundExperts, PackedExperts, reader_of
from ..base_layer import BaseTunerLayer
from .experts import form_of, parameters_of


class Family:
    """The dense modules of a transformers model: it is built again without weights, once.

    Its owner has put the quantised experts in the place of a class that nothing in them names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.built: nn.Module | None = None

    def module(self, name: str) -> nn.Module:
        """A module without weights (on the meta device), by its name in the base model.

        Raises:
            ValueError: the model cannot be built from its configuration, or has none.
        """
        kind: Any = type(self.model)
        if self.built is None:
            config: Any = copy.deepcopy(getattr(self.model, "config", None))
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            try:
                with torch.device("meta"):
                    self.built = kind(config)
            except Exception as error:
                raise ValueError(
                    f"a {kind.__name__} cannot be built from its configuration, which is needed "
                    f"for the class of `{name}` that is not quantised: {error}"
                ) from error
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        found: nn.Module = self.built.get_submodule(plain)
        return found


def why_not_dense(name: str, module: Any, family: Family) -> str | None:
    """The reason that quantised experts cannot be made dense, or None."""
    found = reader_of(module).read(module)
    if isinstance(found, str):
        return str(found)
    try:
        target: Any = family.module(name)
    except (ValueError, AttributeError) as error:
        return str(error)
    for parameter, packed in _weights(module, found).items():
        if form_of(type(target)) is None or parameter not in target._parameters:
            return f"a {type(target).__name__} has no weights as transformers' experts have them"
        E, N, K = packed.shape
        wanted = (E, K, N) if getattr(target, "is_transposed", False) else (E, N, K)
        if tuple(getattr(target, parameter).shape) != wanted:
            shape = tuple(getattr(target, parameter).shape)
            return f"`{parameter}` of a {type(target).__name__} is {shape}, and {wanted} are here"
    return None


def dense_experts(name: str, module: Any, family: Family, dtype: torch.dtype) -> nn.Module:
    """The experts with dense frozen weights in ``dtype``; :func:`why_not_dense` gave None."""
    found: FoundExperts = reader_of(module).read(module)
    made: Any = copy.deepcopy(family.module(name)).train(module.training)
    for parameter, packed in _weights(module, found).items():
        turned = getattr(made, "is_transposed", False)
        made._parameters[parameter] = Parameter(_dense(packed, turned, dtype), requires_grad=False)
    for parameter, bias in zip(
        parameters_of(module), (found.up_bias, found.down_bias), strict=True
    ):
        if bias is not None:
            held = Parameter(bias.detach().to(dtype), requires_grad=False)
            made._parameters[f"{parameter}_bias"] = held
    if hasattr(made, "config"):  # that of the model, whose choices are changed there
        model: Any = family.model
        made.config = getattr(module, "config", None) or model.config.get_text_config()
    return made


def _weights(module: Any, found: FoundExperts) -> dict[str, PackedExperts]:
    return dict(zip(parameters_of(module), (found.up, found.down), strict=True))


def _dense(packed: PackedExperts, turned: bool, dtype: torch.dtype) -> Tensor:
    E, N, K = packed.shape
    shape = (E, K, N) if turned else (E, N, K)
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    for expert in range(E):  # one at a time, so that nothing else is dense meanwhile
        one = packed.of(expert).dense(dtype)
        weight[expert].copy_(one.t() if turned else one)
    return weight


def note_layout(model: nn.Module) -> None:
    """Let adapters on parameters look again at how their parameter lies."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.__dict__.get("parameter_name"):
            layer: Any = module
            layer._in_out_features()
