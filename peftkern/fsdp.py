"""``fsdp_auto_wrap_policy``: the modules of an adapted model that FSDP wraps."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .tuners.p_tuning import PromptEncoder
from .tuners.prefix_tuning import PrefixEncoder
from .tuners.prompt_tuning import PromptEmbedding
from .utils.module_tree import no_split_modules


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy for FSDP1's ``auto_wrap_policy``.

    It wraps each decoder layer and each prompt encoder, and every trained weight separately from
    the frozen ones around it. The layers' classes are those that the model keeps on one device, or
    the names in ``FSDP_TRANSFORMER_CLS_TO_WRAP``.

    Raises:
        TypeError: the model has no module of one of these classes.
    """
    from torch.distributed.fsdp.wrap import (
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = named.split(",") if named is not None else no_split_modules(model)
    classes: set[type[nn.Module]] = {PrefixEncoder, PromptEncoder, PromptEmbedding}
    for name in filter(None, names):
        found = next((type(m) for m in model.modules() if type(m).__name__ == name), None)
        if found is None:
            raise TypeError("Could not find the transformer layer class to wrap in the model.")
        classes.add(found)

    def trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not module._modules and weight is not None and weight.requires_grad

    return functools.partial(
        _any,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trained_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        ],
    )


def _any(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, policies: Sequence[Callable[..., bool]]
) -> bool:
    return any(
        policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)
        for policy in policies
    )
