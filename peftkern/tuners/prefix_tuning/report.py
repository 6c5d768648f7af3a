"""A list of the attention layers that take a prefix, for ``explain``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...ops.prefix_report import describe
from .cached import CachedPrefix
from .inject import PrefixInjection


def _dropout(module: nn.Module) -> float:
    """The dropout on a layer's attention weights in training, as its class keeps it."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        found: Any = getattr(module, name, None)
        found = getattr(found, "p", found)
        if isinstance(found, float):
            return found
    return 0.0


def layers_of(
    model: nn.Module, injection: PrefixInjection | CachedPrefix
) -> Iterator[tuple[str, nn.Module, tuple[int, int], tuple[bool, str, str]]]:
    """(name in ``model``, module, (P, width of the prefix's keys), description) of each layer.

    These are the layers with a prefix; when it goes through the cache, the one module that takes
    the cache. The description is that of :func:`peftkern.ops.prefix_report.describe`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    told: tuple[bool, str, str]
    if isinstance(injection, CachedPrefix):
        told = (False, "keys and values in the cache", injection.why)
        yield names.get(id(injection.stack), ""), injection.stack, injection.shape, told
        return
    shape = (injection.num_virtual_tokens, injection.kv_heads * injection.head_dim)
    for module in injection.attentions:
        if injection.family.block is not None:
            told = (
                False,
                "concatenated keys",
                f"{type(module).__name__} computes attention itself, outside AttentionInterface",
            )
        else:
            weight = next((p for p in module.parameters() if p.is_floating_point()), None)
            biased = hasattr(module, "compute_bias")
            told = describe(
                torch.empty(0) if weight is None else weight,
                injection.head_dim,
                softcap=getattr(module, "attn_logit_softcapping", None),
                sinks=getattr(module, "sinks", None),
                dropout=_dropout(module),
                bias=torch.empty(0) if biased else None,
            )
        if injection.note:
            told = (*told[:2], f"{told[2]}; {injection.note}")
        yield names.get(id(module), ""), module, shape, told
