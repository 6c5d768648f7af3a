"""``create_arrow_model``: several saved adapters in one model, among which Arrow routes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from .configs.lora import ArrowConfig, LoraConfig
from .model import PeftModel
from .tuners.lora.arrow import (
    GENERAL,
    ROUTER,
    TASK,
    _resolve_adapter_source,
    check_loaded_lora_compatibility_arrow,
    ensure_adapters_target_linear_layers_only,
)


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters of one form and return a model that routes each token among them.

    The adapters are called task_0, task_1, ... and gks_0, ...; the active one is "arrow_router". An
    adapter that is loaded later, under any name, is routed to as well.

    Args:
        base_model: the base model, changed in place.
        task_specific_adapter_paths: folders, or on the hub ``owner/name`` and
            ``owner/name/folder``.
        arrow_config: the settings; the names of the adapters are put into it.
        general_adapter_paths: adapters whose mean is subtracted from the others, with ``use_gks``.
        **adapter_kwargs: for :meth:`PeftModel.from_pretrained` and ``load_adapter``.

    Raises:
        ValueError: no adapter; ``use_gks`` without general ones; fewer adapters than ``top_k``; or
            adapters that differ in rank, shapes or layers.
        TypeError: adapters of other than linear layers.
    """
    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    count = len(task_specific_adapter_paths)
    if arrow_config.top_k > count:
        raise ValueError(
            f"`top_k` is {arrow_config.top_k}, and `task_specific_adapter_paths` holds {count}"
        )
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    named = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    named |= {f"{GENERAL}{i}": path for i, path in enumerate(general)}
    model: Any = None
    for name, path in named.items():
        source, folder = _resolve_adapter_source(os.fspath(path))
        how = dict(adapter_kwargs)
        if folder is not None:
            how.setdefault("subfolder", folder)
        if model is None:
            model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **how)
        else:
            model.load_adapter(source, adapter_name=name, **how)
    ensure_adapters_target_linear_layers_only(model, list(named))
    targets, r = check_loaded_lora_compatibility_arrow(model, list(named))
    arrow_config.task_adapter_names = list(named)[:count]
    arrow_config.gks_adapter_names = list(named)[count:]
    first = model.peft_config[f"{TASK}0"]
    router = LoraConfig(
        arrow_config=arrow_config,
        target_modules=targets,
        r=r,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
    )
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model
