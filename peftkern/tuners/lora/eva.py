"""EVA (Paischer et al., 2024, arXiv 2410.07170): A starts as the main components of the inputs.

Layers whose inputs vary in more directions get larger ranks. The components of each layer's inputs
are found batch by batch, until those that are needed stop changing. Layers that read the same input
share them. The components of all layers are then ordered by the share of variance that they
explain, and the first ones are kept, as many as the sum of the ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from ...utils.module_tree import get_submodules
from ...utils.shards import part_like
from ...utils.undo import in_mode
from ..target_names import _find_minimal_target_modules
from ..tensor_parallel import tensor_parallel
from .attention import MultiheadAttention
from .base import LoraLayer
from .conv import _ConvNd
from .embedding import Embedding
from .eva_components import Prepare, components_of
from .eva_inputs import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .group import form_groups
from .inits.calibration import linear_targets
from .linear import Linear
from .ranks import rank_and_alpha

UNSUPPORTED_LORA_MODULES = (Embedding, MultiheadAttention, _ConvNd)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | dict[str, Prepare] = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """{layer: the components [rank, K] of its inputs}; a layer may get rank 0.

    Args:
        model: a model with adapters (which are switched off meanwhile), or a plain one.
        dataloader: batches, with a length; repeated as often as needed.
        peft_config: ranks and ``eva_config``; the adapter's by default. Needed for a plain model.
        forward_fn: ``forward_fn(model, batch)``; the default is ``model(**batch)``.
        prepare_model_inputs_fn: called with (batch, peft_config); its result is handed to the next
            function. The default returns the positions that are no padding and have a label. None:
            the batch itself is handed on.
        prepare_layer_inputs_fn: called with (the layer's positional arguments, the result above,
            the layer's name); returns the rows [M, K] to use. The default takes those positions of
            the first argument; None takes all. A dict gives a function for each layer name.
        adapter_name: the adapter whose configuration is used.
        gather_distributed_inputs: use the rows of all ranks of torch.distributed together.
        show_progress_bar: show progress.

    Raises:
        ValueError: no batch, no configuration, a layer that is never called, or batches with too
            few rows; ranks share the model's layers out.
    """
    if tensor_parallel(model) is not None:
        raise ValueError(
            "Tensor parallelism: EVA needs the whole inputs of layers that ranks share out. Call "
            "`get_eva_state_dict` in one process, and give `initialize_lora_eva_weights` its "
            "result as `eva_state_dict`. Nothing was changed."
        )
    adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if not adapted:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = model.peft_config[adapter_name]  # type: ignore[index,assignment]
    assert peft_config is not None
    targets: dict[str, Any]
    if adapted:
        kinds = UNSUPPORTED_LORA_MODULES
        inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, kinds))
        targets = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
            and not isinstance(module, kinds)
            and not name.startswith(inside)
        }
    else:
        targets = dict(linear_targets(model, peft_config))
    disabled: Any = model.disable_adapter() if adapted else nullcontext()  # type: ignore[operator]
    with disabled, in_mode(model, training=False):
        return components_of(
            model,
            targets,
            dataloader,
            peft_config,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            gather_distributed_inputs,
            show_progress_bar,
        )


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | dict[str, Prepare] = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give the layers of an adapter made with ``init_lora_weights="eva"`` their ranks and A.

    Args:
        model: the model with the adapter, which must be the only active one.
        dataloader: see :func:`get_eva_state_dict`, as for the other arguments.
        eva_state_dict: the result of that function, in place of ``dataloader``.

    A layer with rank 0 loses its adapter layer. A layer that is not in the state dict gets the
    plain initialisation, with a warning. The configuration's ``target_modules`` and patterns are
    updated to the resulting layers and ranks.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    active: Any = model.active_adapters
    if len(active() if callable(active) else active) > 1:
        raise ValueError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    if config.init_lora_weights != "eva":
        raise ValueError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _load(model, dict(eva_state_dict), adapter_name, config)


def _load(
    model: nn.Module, components: dict[str, Tensor], adapter: str, config: LoraConfig
) -> None:
    eva, plain = copy(config), copy(config)
    eva.init_lora_weights, plain.init_lora_weights = "eva", True
    settings: Any = config.eva_config
    kept: list[str] = []
    missing: list[str] = []
    others: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in list(model.named_modules()):
        short = name.replace("base_model.model.", "")
        if not isinstance(module, LoraLayer):
            others.append(short)
            continue
        r, alpha = rank_and_alpha(config, name)
        new = r
        if name in components:
            value = components.pop(name)
            new = len(value)
            if new == 0:
                parent, _, last = get_submodules(model, name)
                setattr(parent, last, module.get_base_layer())
                continue
            if new != r and settings.adjust_scaling_factors:
                alpha *= new / r
            weight: Any = module.lora_A[adapter].weight  # type: ignore[attr-defined]
            if new != r or weight.is_meta:
                _renew(module, adapter, new, alpha, eva)
            weight = module.lora_A[adapter].weight  # type: ignore[attr-defined]
            weight.copy_(part_like(weight, value.to(weight.dtype)))
            kept.append(short)
        else:
            _renew(module, adapter, r, alpha, plain)
            missing.append(short)
        if new != config.r:
            ranks[short] = new
        if alpha != config.lora_alpha:
            alphas[short] = alpha
    names: Any = kept + missing
    if len(names) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        names = _find_minimal_target_modules(names, others)
    config.target_modules = set(names)
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    form_groups(model, Linear)
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were "
            f"not found in the eva state_dict: {missing}\ncurrently the following lora modules are "
            f"not supported by EVA: {UNSUPPORTED_LORA_MODULES}",
            stacklevel=3,
        )


def _renew(layer: Any, adapter: str, r: int, alpha: float, config: LoraConfig) -> None:
    """Make a layer's adapter again with rank ``r``; it keeps its dtype and whether it trains."""
    stores = [s for s in layer._stores() if adapter in s]
    old = stores[0][adapter]
    old = old.weight if isinstance(old, nn.Module) else old
    base = next(layer.get_base_layer().parameters())
    layer.update_layer(
        adapter,
        r,
        alpha,
        config,
        autocast_dtype=old.dtype != base.dtype,
        trainable=old.requires_grad,
    )
