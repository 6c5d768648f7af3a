"""Variants of LoRA: other ways to put A and B (and more) on a layer's output, one object for each
adapter that uses one.

A layer's ``lora_variant`` maps adapter names to them and is empty for plain LoRA; its class says in
``lora_variants`` which settings of a :class:`LoraConfig` it knows. A call with an active variant
never takes the fused path of plain LoRA.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from torch import Tensor

# what a model hands to variants of its layers, and never to their base layers
VARIANT_KWARGS = ("alora_offsets",)


class LoraVariant:
    """What one adapter of one layer does in place of adding B A x.

    Methods get the layer and the adapter's name, since one class serves several kinds of layer.
    """

    # the layer's name in the model, for `init`
    target_name = ""

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        """Make what the adapter has beside A and B, which are made already; they may be on the meta
        device, to be assigned later."""

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output with this adapter.

        Args:
            layer: the LoRA layer that is called.
            adapter: the adapter's name.
            x: the layer's input, as it came.
            result: the output so far: the base layer's, and that of adapters before this one.
            **kwargs: those of ``VARIANT_KWARGS`` that the call had.
        """
        raise NotImplementedError

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        """The output for x from one operation, when this is the only active adapter; None when it
        cannot be, and :meth:`update` is to do it. :meth:`fused_as` has said that it may be."""
        return None

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        """What that operation is called in ``explain``; None where the layer's modules stand
        against it, or there is none."""
        return None

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        """``weight`` with this adapter merged into it.

        Args:
            layer: the LoRA layer.
            adapter: the adapter's name.
            weight: the base weight with the adapters merged so far, at least float32.
            base: the base weight without any adapter, which is ``weight`` for the first one.
        """
        return layer._delta_weight(adapter).to(weight.device, weight.dtype).add_(weight)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """B [N, r] and A [r, K] whose product times the scaling is the update of a linear layer's
        weight, where the variant's is one."""
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight

    def ready(self, layer: Any, adapter: str) -> None:
        """Do what had to wait for the base weight, before a call or a merge reads it."""

    def decline(self, layer: Any, adapter: str) -> str:
        """Why calls do not run as plain LoRA's one operation, for ``explain`` and logs."""
        raise NotImplementedError

    def refuses_mixed(self) -> str | None:
        """Why the adapter cannot be named for rows of a batch, None when it can."""
        return None

    def supports_lora_conversion(self) -> bool:
        """Whether the adapter may be turned into one of plain LoRA."""
        return True


@cache
def _selecting(config_class: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fields that select a variant by being true, values of ``init_lora_weights`` that do)."""
    fields = dataclasses.fields(config_class)
    by_value = [n for f in fields for n in f.metadata.get("lora_variants", ())]
    return tuple(f.name for f in fields if f.metadata.get("is_lora_variant")), tuple(by_value)


def select(known: Any, config: Any) -> LoraVariant | None:
    """A new variant as ``config`` asks for, None for plain LoRA.

    Args:
        known: {sorted names of settings that ask for it: class of the variant, None for plain
            LoRA}.
        config: a :class:`LoraConfig`.

    Raises:
        ValueError: the settings name no variant of ``known``, or ``known`` itself is wrong.
    """
    by_truth, by_value = _selecting(config.__class__)
    if any(tuple(sorted(names)) != names for names in known):
        raise ValueError("Keys of lora_variants must be sorted tuples.")
    if unknown := {n for names in known for n in names}.difference(by_truth, by_value):
        raise ValueError(
            f"{sorted(unknown)} found in lora_variants, but no field of "
            f"{type(config).__name__} selects a variant of that name."
        )
    asked = [name for name in by_truth if getattr(config, name)]
    asked += [name for name in by_value if config.init_lora_weights == name]
    key = tuple(sorted(asked))
    if key not in known:
        raise ValueError(f"Invalid or unsupported variant combination: {key}")
    variant = known[key]
    return None if variant is None else variant()


def take_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what is for variants out of a call's keywords."""
    return {name: kwargs.pop(name) for name in VARIANT_KWARGS if name in kwargs}


def rows_of(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Keywords for variants, of which each has one value for a row of the batch, for these rows."""
    if not kwargs:
        return kwargs
    indices = rows.tolist()
    return {k: v if v is None else [v[i] for i in indices] for k, v in kwargs.items()}


def make_ready(layer: Any) -> None:
    """See :meth:`LoraVariant.ready`."""
    for name, variant in layer.lora_variant.items():
        variant.ready(layer, name)


def active_variant(layer: Any) -> tuple[str, LoraVariant] | None:
    """(adapter, variant) of the first active adapter that is not plain LoRA."""
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        if variant is not None:
            return name, variant
    return None
