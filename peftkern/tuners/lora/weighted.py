"""``add_weighted_adapter``: makes a new adapter from those that a model has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ...configs.lora import LoraConfig
from ...utils.collectives import from_first_rank
from ...utils.gathering import is_shard
from ...utils.shards import part_like, put_data, whole
from ..modules_to_save import ModulesToSaveWrapper
from .base import LoraLayer
from .combination import BY_FACTOR, BY_PRODUCT, AdapterFactors, Combination, CombinationType
from .embedding import Embedding
from .restore import at_least_float32
from .tying import share_again


def _tensors(layer: Any, name: str) -> tuple[Any, Any] | None:
    """The parameters (A, B) of an adapter in a layer; None when it has none there."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return None


class Weighted:
    """The part of :class:`LoraModel` that combines adapters."""

    model: nn.Module
    peft_config: dict[str, Any]

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Make a new adapter, neither active nor trainable, from others by a weighted rule.

        "cat" is exact; its rank is the sum of the ranks. "svd" is the best approximation of a
        given rank. "linear" combines A with A and B with B, which is fast but inexact. "ties",
        "dare_*" and "magnitude_prune" prune first (see :mod:`peftkern.utils.merge_utils`): A and B
        or, with "_svd", the updates. All compute in at least float32. A single adapter is always
        combined by "linear", which scales it.

        Args:
            adapters: names of the adapters to combine.
            weights: one number for each adapter; negative ones are allowed.
            adapter_name: name of the new adapter; nothing happens when an adapter has that name.
            combination_type: the rule.
            svd_rank: rank for the rules with SVD; None: the largest rank of the adapters.
            svd_clamp: quantile in [0, 1]; values of both factors beyond it are clamped to it.
            svd_full_matrices: argument of :func:`torch.linalg.svd`.
            svd_driver: argument of :func:`torch.linalg.svd`.
            density: share of values to keep, in [0, 1], for the rules that prune.
            majority_sign_method: the rule by which TIES elects signs, "total" or "frequency".

        Raises:
            ValueError: an unknown adapter or rule, unequal ranks for a rule that needs equal ones,
                a missing density, or modules that several of the adapters train in full.

        After an error there is no new adapter.
        """
        if adapter_name in self.peft_config:
            return
        kind, rank, targets = self._check_add_weighted_adapter(
            list(adapters), combination_type, svd_rank
        )
        if len(weights) != len(adapters):
            raise ValueError(
                f"`weights` should have one number for each of {len(adapters)} adapters, but has "
                f"{len(weights)}"
            )
        rule = Combination(
            kind, rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        self._check_combination(rule)
        for layer in self._lora_layers():
            self._parts(layer, adapters, weights, rule)
        first = self.peft_config[adapters[0]]
        saved = [m for name in adapters for m in self.peft_config[name].modules_to_save or ()]
        config = replace(
            first,
            r=rank,
            lora_alpha=rank,  # a scaling of 1
            use_rslora=False,  # with it the scaling would be √r
            target_modules=targets,
            alpha_pattern={},
            rank_pattern={},
            modules_to_save=list(dict.fromkeys(saved)) or None,
            lora_bias=any(self.peft_config[name].lora_bias for name in adapters),
        )
        # the first values are overwritten, so no method that changes base weights may make them
        config.init_lora_weights = True
        self._make_from(config, adapter_name, adapters, weights, rule)
        config.init_lora_weights = first.init_lora_weights

    def _lora_layers(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, LoraLayer)]

    def _check_combination(self, rule: Combination) -> None:
        base = rule.kind.removesuffix("_svd")
        if base not in ("linear", "svd", "cat"):
            if rule.density is None:
                raise ValueError(f"`density` is needed for {rule.kind!r}, in [0, 1]")
            if rule.density < 0:
                raise ValueError(f"Density should be >= 0, got {rule.density}")
            if base.endswith("ties") and rule.signs not in ("total", "frequency"):
                raise RuntimeError(f'Unimplemented mask method "{rule.signs}"')
        if rule.clamp is not None and not 0 <= rule.clamp <= 1:
            raise ValueError(f"`svd_clamp` should be in [0, 1] but is {rule.clamp}")

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        """Check the arguments; returns (rule, rank, target modules) of the new adapter."""
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
        if not adapters:
            raise ValueError(f"Found no adapter matching the names in {adapters}")
        configs: list[LoraConfig] = [self.peft_config[name] for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.target_parameters:
                raise ValueError(
                    "add_weighted_adapter does not support targeting nn.Parameter (problematic "
                    f"adapter '{name}')"
                )
        shared = [
            m
            for m in self.model.modules()
            if isinstance(m, ModulesToSaveWrapper)
            and sum(name in m.modules_to_save for name in adapters) > 1
        ]
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with "
                f"modules_to_save, but found {len(shared)} such instance(s)."
            )
        kind = "linear" if len(adapters) == 1 else combination_type
        ranks = [max(c.r, *c.rank_pattern.values(), 1) for c in configs]
        if kind in BY_FACTOR:
            if len(set(ranks)) != 1:
                raise ValueError(
                    "All adapters must have the same r value when using combination_type linear, "
                    "ties, dare_ties or dare_linear."
                )
            rank = ranks[0]
        elif kind == "cat":
            rank = sum(ranks)
        elif kind in BY_PRODUCT:
            rank = svd_rank or max(ranks)
        else:
            raise ValueError(f"Invalid combination_type: {kind}")
        return kind, rank, _union([c.target_modules for c in configs])

    def _parts(
        self, layer: Any, adapters: Sequence[str], weights: Sequence[float], rule: Combination
    ) -> list[AdapterFactors]:
        """The factors of these adapters in a layer; ValueError when they cannot be combined."""
        parts = []
        for name, weight in zip(adapters, weights, strict=True):
            found = _tensors(layer, name)
            if found is None:
                continue
            A, B = (at_least_float32(whole(t)).flatten(1) for t in found)
            variant = layer.lora_variant.get(name)
            rules = None if variant is None else variant.combined_by(layer, name)
            if rules is not None:
                if rule.kind not in rules:
                    raise ValueError(
                        f"{name!r} has factors of a form of their own ({variant.name}), which "
                        f"{rule.kind!r} does not keep; allowed: {', '.join(rules)}"
                    )
            elif B.shape[1] != len(A):
                raise ValueError(
                    f"{name!r} has a grouped convolution, whose update is no product; adapters "
                    "of these cannot be combined"
                )
            parts.append(AdapterFactors(A, B, float(layer.scaling[name]), float(weight)))
        if rule.kind in BY_FACTOR and len({len(p.A) for p in parts}) > 1:
            raise ValueError(
                f"All adapters must have the same r value when using combination_type "
                f"{rule.kind}, but in a layer of {type(layer.get_base_layer()).__name__} they "
                f"have {[len(p.A) for p in parts]} (rank_pattern)."
            )
        if rule.kind in BY_FACTOR and len({(p.A.shape, p.B.shape) for p in parts}) > 1:
            raise ValueError(
                f"{rule.kind!r} combines factors of one shape, but those of {list(adapters)} in "
                f"the same layer are {[(tuple(p.A.shape), tuple(p.B.shape)) for p in parts]}: "
                f"{', '.join(sorted({v.name for v in layer.lora_variant.values()}))}"
            )
        return parts

    @torch.no_grad()
    def _make_from(
        self,
        config: LoraConfig,
        adapter_name: str,
        adapters: Sequence[str],
        weights: Sequence[float],
        rule: Combination,
    ) -> None:
        """Put the new adapter into the model and fill it; an error removes it again."""
        tuner: Any = self
        self.peft_config[adapter_name] = config
        try:
            tuner.inject_adapter(self.model, adapter_name)
            for layer in self._lora_layers():
                target = _tensors(layer, adapter_name)
                if target is None:
                    continue
                parts = self._parts(layer, adapters, weights, rule)
                if not parts:
                    raise ValueError(
                        f"None of {list(adapters)} has weights in a layer that the new adapter "
                        f"targets ({type(layer.get_base_layer()).__name__})."
                    )
                dtype = self._dtype(layer, adapters)
                transposed = isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False)
                factors = rule.factors(parts, transposed)
                for tensor, value, axis in zip(target, factors, (0, 1), strict=True):
                    flat = value.new_zeros((len(tensor), tensor[:1].numel()))
                    flat.narrow(axis, 0, value.shape[axis]).copy_(value)
                    if is_shard(tensor):  # rules that draw may draw otherwise on another rank
                        flat = from_first_rank(flat, tensor.device_mesh.get_group())
                    put_data(tensor, part_like(tensor, flat.to(dtype).view(tensor.shape)))
                self._fill_bias(layer, adapter_name, adapters, weights)
            share_again(tuner)
            self._fill_saved(adapter_name, adapters)
        except BaseException:
            tuner.delete_adapter(adapter_name)
            tuner._take_out(only_empty=True)
            raise
        for layer in self._lora_layers():
            layer.set_requires_grad(adapter_name, False)

    @staticmethod
    def _dtype(layer: Any, adapters: Sequence[str]) -> torch.dtype:
        """The widest dtype among the adapters of a layer."""
        found = [t for name in adapters if (t := _tensors(layer, name)) is not None]
        dtypes = [tensor.dtype for pair in found for tensor in pair]
        return functools.reduce(torch.promote_types, dtypes)

    def _fill_saved(self, adapter_name: str, adapters: Sequence[str]) -> None:
        """Copy each module that one of the adapters trained in full to the new adapter."""
        for module in self.model.modules():
            if not isinstance(module, ModulesToSaveWrapper):
                continue
            held = module.modules_to_save
            for name in adapters:
                if name in held and adapter_name in held:
                    held[adapter_name].load_state_dict(held[name].state_dict())

    @staticmethod
    def _fill_bias(
        layer: Any, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]
    ) -> None:
        """Set lora_bias to the weighted sum of the adapters' biases, for every rule."""
        if not layer.lora_bias.get(adapter_name):
            return
        bias = layer.lora_B[adapter_name].bias  # where ranks share it out, so do they the sum
        total = torch.zeros_like(at_least_float32(bias))
        dtype = layer.lora_B[adapter_name].weight.dtype
        for name, weight in zip(adapters, weights, strict=True):
            if layer.lora_bias.get(name):
                found = at_least_float32(layer.lora_B[name].bias)
                total += found * (weight * layer.scaling[name])
        put_data(bias, total.to(dtype))


def _union(targets: list[Any]) -> Any:
    """Target modules that match when one of ``targets`` does; all are sets, or all are patterns."""
    if len({type(t) for t in targets}) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. Combining adapters "
            "with `target_modules` type being a mix of list/set and string is not supported."
        )
    if isinstance(targets[0], str):
        return "|".join(f"({t})" for t in targets)
    if isinstance(targets[0], set):
        return set().union(*targets)
    raise TypeError(f"Invalid type {type(targets[0])} found in target_modules")
