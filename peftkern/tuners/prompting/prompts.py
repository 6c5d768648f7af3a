"""The prompts of a model: as files hold them, for the rows of a batch, for each attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...configs.base import PeftConfig
from ..prefix_tuning import PrefixTuningConfig
from ..wrapped import innermost
from .sizes import attention_layers, key_lenders, layer_shapes

BASE = "__base__"  # as an adapter's name: the base model alone
LayerPrefix = tuple[Tensor, Tensor]  # Kp, Vp: [H_kv, P, D], or [B, H_kv, P, D]


class Prompts:
    """What a :class:`.tuner.PromptTuner` knows of its prompts.

    ``host`` is the PeftModel that the prompts belong to, or a copy of it on another device: the
    encoders and the base model are the host's.
    """

    peft_config: dict[str, Any]
    injection: Any  # of prefixes into the model's attention; None before there is one

    def rows(self, adapter_names: Sequence[str] | None, batch_size: int) -> list[str] | None:
        """The adapter of each row of the batch; None when all take the active one.

        Raises:
            ValueError: there is no adapter of that name, or the number of names is another.
        """
        if adapter_names is None:
            return None
        names = list(adapter_names)
        if len(names) != batch_size:
            raise ValueError(
                "`adapter_names` must have one name for each row of the batch: got "
                f"{len(names)} names for {batch_size} rows"
            )
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        lengths = {n: self.peft_config[n].num_virtual_tokens for n in names if n != BASE}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                "`adapter_names`: prompts of one batch must have one length, got "
                + ", ".join(f"{name}: {P}" for name, P in sorted(lengths.items()))
                + " virtual tokens"
            )
        seen = {getattr(self.peft_config[n], "prefix_always_visible", None) for n in lengths}
        if len(seen) > 1:
            raise ValueError(
                "`adapter_names`: prefixes of one batch must agree in `prefix_always_visible`"
            )
        return names

    def virtual_tokens(self, host: Any, rows: list[str] | None) -> int:
        """P of this batch, see :meth:`rows`; 0 when every row is the base model's."""
        names = [name for name in rows or [host.active_adapter] if name != BASE]
        return self.peft_config[names[0]].num_virtual_tokens if names else 0

    def prompts(self, host: Any, batch_size: int, rows: list[str] | None = None) -> Tensor | None:
        """Virtual tokens for every row, [batch, P, token_dim], views where rows share them.

        None when every row is the base model's. A second submodule's tokens are left out: they are
        not used, but HF PEFT's files have them.
        """
        names = rows or [host.active_adapter]
        unique = list(dict.fromkeys(names))
        if unique == [BASE]:
            return None
        if BASE in unique:
            raise ValueError(
                f"`adapter_names`: {BASE!r} cannot share a batch with prompts that stand in front "
                "of the input, as its rows would be shorter; call the model apart for them"
            )
        P = self.virtual_tokens(host, rows)
        prompts = [host.prompt_encoder[name].prompt()[:P] for name in unique]
        if len(prompts) == 1:
            return prompts[0].expand(batch_size, -1, -1)
        return torch.stack(prompts)[_index(names, unique, prompts[0].device)]

    def prefix_layers(
        self, host: Any, batch_size: int, adapter_names: Sequence[str] | None = None
    ) -> tuple[list[LayerPrefix | None], Tensor | None]:
        """What every attention layer sees of the prefix: see :meth:`own_prefixes`; a layer that
        attends to another's keys sees that one's. What goes through the cache is without those."""
        prefixes, no_prefix = self.own_prefixes(host, batch_size, adapter_names)
        if getattr(self.injection, "through_cache", False):
            return prefixes, no_prefix
        return _lent(prefixes, innermost(host)), no_prefix

    def own_prefixes(
        self, host: Any, batch_size: int, adapter_names: Sequence[str] | None = None
    ) -> tuple[list[LayerPrefix | None], Tensor | None]:
        """Keys and values of the prefix for every attention layer that has keys of its own.

        Args:
            batch_size: rows of the batch, B.
            adapter_names: the prefix of each row; "__base__" for none.

        Returns:
            For each layer (Kp, Vp), in the model's dtype: [H_kv, P, D] when all rows have one
            prefix, else [B, H_kv, P, D]; None for a layer that takes no prefix. Then ``no_prefix``,
            bool [B]: rows that must not see theirs, or None.

        In HF PEFT's layout layer l reads the rows' slices 2l and 2l + 1. With two submodules it is
        4l and 4l + 1, modulo the number of slices: layers l and l + L/2 share a prefix.
        """
        rows = self.rows(adapter_names, batch_size)
        names = rows or [host.active_adapter]
        unique = list(dict.fromkeys(n for n in names if n != BASE))
        if not unique:
            return [], None
        config = self.peft_config[unique[0]]
        layers = attention_layers(config, innermost(host))
        slices = [self._slices(host, name) for name in unique]
        device = slices[0][0].device
        no_prefix = torch.tensor([n == BASE for n in names], device=device)
        per_row = len(unique) > 1
        # a row without a prefix stands on the first one, which it does not see
        index = _index(names, [BASE, *unique], device).sub(1).clamp(min=0) if per_row else None

        def of_rows(i: int) -> Tensor:
            parts = [part[i] for part in slices]
            return torch.stack(parts)[index] if per_row else parts[0]

        step = 2 * config.num_transformer_submodules
        count = len(slices[0])
        pairs = [
            (of_rows(step * i % count), of_rows((step * i + 1) % count)) for i in range(layers)
        ]
        return _fitted(pairs, innermost(host)), no_prefix if BASE in names else None

    def _slices(self, host: Any, adapter_name: str) -> tuple[Tensor, ...]:
        """The prefix as 2 * num_layers tensors [H_kv, P, D], views of the parameter."""
        config = self.peft_config[adapter_name]
        rows = host.prompt_encoder[adapter_name].prompt()  # [P, 2 * num_layers * token_dim]
        dtype = host.base_model_torch_dtype
        heads = config.num_attention_heads
        rows = rows if dtype is None else rows.to(dtype)
        parts = rows.view(
            config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads
        )
        # unbound, and not indexed: then backward fills one tensor and not one for each slice
        return parts.permute(1, 2, 0, 3).unbind(0)

    def in_hf_form(self, host: Any, batch_size: int) -> Any:
        """What HF PEFT's ``get_prompt`` gives for the active adapter, see
        :meth:`peftkern.PeftModel.get_prompt`."""
        config: PeftConfig = host.active_peft_config
        if not isinstance(config, PrefixTuningConfig):
            return host.prompt_encoder[host.active_adapter].prompt().expand(batch_size, -1, -1)
        from ..prefix_tuning.cached import prefix_cache  # imports transformers' caches

        prefixes, _ = self.own_prefixes(host, batch_size)
        two = config.num_transformer_submodules == 2
        return prefix_cache(prefixes, batch_size, innermost(host), two)


def divide(
    pairs: list[LayerPrefix], model: Any
) -> tuple[list[LayerPrefix | None], list[LayerPrefix | None]]:
    """What every attention layer of ``model`` sees of a prefix for each layer, and what those have
    that write keys of their own."""
    own = _fitted(pairs, model)
    return _lent(own, model), own


def _lent(own: list[LayerPrefix | None], model: Any) -> list[LayerPrefix | None]:
    lenders = key_lenders(model, len(own)) if own else {}
    return [own[lenders.get(layer, layer)] for layer in range(len(own))]


def _index(names: list[str], among: list[str], device: torch.device) -> Tensor:
    return torch.tensor([among.index(name) for name in names], device=device)


def _fitted(pairs: list[LayerPrefix], model: Any) -> list[LayerPrefix | None]:
    """The part of the prefix that each layer takes, where a model's layers differ in size."""
    shapes = layer_shapes(model, len(pairs))
    if not shapes:
        return list(pairs)
    fitted: list[LayerPrefix | None] = []
    for (key, value), shape in zip(pairs, shapes, strict=True):
        heads, _, head_dim = key.shape[-3:]
        if shape is None or shape[0] > heads or shape[1] > head_dim:
            fitted.append(None)
        else:
            h, d = shape
            fitted.append((key[..., :h, :, :d], value[..., :h, :, :d]))
    skipped = [i for i, pair in enumerate(fitted) if pair is None]
    if len(skipped) == len(fitted):
        heads, _, head_dim = pairs[0][0].shape[-3:]
        raise ValueError(
            "Prefix tuning skipped every layer: none takes a prefix of "
            f"num_attention_heads={heads}, head_dim={head_dim}"
        )
    if skipped:
        warnings.warn(
            f"Prefix tuning skipped {skipped} due to KV shape: these layers have larger keys than "
            "the prefix, or another layer's keys, and then that one's prefix.",
            stacklevel=3,
        )
    return fitted
