"""``Prompts``: the prompts of a model, for the rows of a batch and for each attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...configs.base import PeftConfig
from ...utils.collectives import span, with_summed_grad
from ..prefix_tuning import PrefixTuningConfig
from ..tensor_parallel import key_mesh
from ..wrapped import innermost
from .encoder import virtual_tokens
from .sizes import attention_layers, key_lenders, layer_shapes

BASE = "__base__"  # in place of an adapter's name: the base model alone
LayerPrefix = tuple[Tensor, Tensor]  # Kp, Vp: [H_kv, P, D], or [B, H_kv, P, D]


class Prompts:
    """Reads the prompts of a :class:`.tuner.PromptTuner`.

    ``host`` is the PeftModel that the prompts belong to, or a copy of it on another device. It
    holds the encoders and the base model.
    """

    peft_config: dict[str, Any]
    injection: Any  # PrefixInjection or CachedPrefix; None before the first prefix

    def rows(self, adapter_names: Sequence[str] | None, batch_size: int) -> list[str] | None:
        """The adapter of each row of the batch; None when all rows use the active one.

        Raises:
            ValueError: an unknown adapter, or a number of names that is not ``batch_size``.
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
        """P, the virtual tokens of these :meth:`rows`; 0 when no row has a prompt."""
        names = [name for name in rows or [host.active_adapter] if name != BASE]
        return self.peft_config[names[0]].num_virtual_tokens if names else 0

    def prompts(self, host: Any, batch_size: int, rows: list[str] | None = None) -> Tensor | None:
        """Virtual tokens for every row, [batch, P, token_dim]; views where rows share them.

        None when no row has a prompt. The tokens of a second submodule are left out: HF PEFT's
        files have them, but they are not used.
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
        prompts = [virtual_tokens(host.prompt_encoder[name])[:P] for name in unique]
        if len(prompts) == 1:
            return prompts[0].expand(batch_size, -1, -1)
        return torch.stack(prompts)[_index(names, unique, prompts[0].device)]

    def prefix_layers(
        self, host: Any, batch_size: int, adapter_names: Sequence[str] | None = None
    ) -> tuple[list[LayerPrefix | None], Tensor | None]:
        """The prefix that every attention layer sees, in the form of :meth:`own_prefixes`.

        A layer that attends to another layer's keys sees that layer's prefix; when the prefix goes
        through the cache, it gets None.
        """
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
            adapter_names: the adapter of each row, "__base__" for a row without a prefix; None:
                the active adapter for all rows.

        Returns:
            (prefixes, no_prefix). ``prefixes`` has (Kp, Vp) for each layer, in the model's dtype:
            [H_kv, P, D] when all rows have the same prefix, else [B, H_kv, P, D]; None for a layer
            that takes no prefix. ``no_prefix`` is bool [B], True for rows that must not see their
            prefix, or None. ([], None) when no row has a prefix.

        In HF PEFT's layout layer l reads slices 2l and 2l + 1 of a virtual token. With two
        submodules these are 4l and 4l + 1, modulo the number of slices, so that layers l and
        l + L/2 share a prefix.
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
        # a row without a prefix takes the first adapter's as a filler, which it does not see
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
        """The prefix as 2 * num_layers tensors [H_kv, P, D], views of the parameter.

        Under tensor parallelism H_kv are this rank's heads.
        """
        config = self.peft_config[adapter_name]
        rows = virtual_tokens(host.prompt_encoder[adapter_name])  # [P, 2 * num_layers * token_dim]
        mesh = key_mesh(innermost(host))
        if mesh is not None:  # each rank has the gradient of its own heads
            rows = with_summed_grad(rows, mesh.get_group())
        dtype = host.base_model_torch_dtype
        heads = config.num_attention_heads
        rows = rows if dtype is None else rows.to(dtype)
        parts = rows.view(
            config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads
        )
        # unbind and not indexing: its backward fills one tensor, indexing's one for each slice
        parts = parts.permute(1, 2, 0, 3)
        if mesh is not None:
            start, stop = span(heads, mesh)
            parts = parts[:, start:stop]
        return parts.unbind(0)

    def in_hf_form(self, host: Any, batch_size: int) -> Any:
        """The active adapter's prompt as HF PEFT's ``get_prompt`` returns it.

        See :meth:`peftkern.PeftModel.get_prompt`.
        """
        config: PeftConfig = host.active_peft_config
        if not isinstance(config, PrefixTuningConfig):
            return virtual_tokens(host.prompt_encoder[host.active_adapter]).expand(
                batch_size, -1, -1
            )
        from ..prefix_tuning.cached import prefix_cache  # imports transformers' caches

        prefixes, _ = self.own_prefixes(host, batch_size)
        two = config.num_transformer_submodules == 2
        return prefix_cache(prefixes, batch_size, innermost(host), two)


def divide(
    pairs: list[LayerPrefix], model: Any
) -> tuple[list[LayerPrefix | None], list[LayerPrefix | None]]:
    """(the prefix that each attention layer of ``model`` sees, the prefix of its own keys).

    The second is None for a layer that writes no keys. ``pairs`` has a prefix for each layer.
    """
    own = _fitted(pairs, model)
    return _lent(own, model), own


def _lent(own: list[LayerPrefix | None], model: Any) -> list[LayerPrefix | None]:
    lenders = key_lenders(model, len(own)) if own else {}
    return [own[lenders.get(layer, layer)] for layer in range(len(own))]


def _index(names: list[str], among: list[str], device: torch.device) -> Tensor:
    return torch.tensor([among.index(name) for name in names], device=device)


def _fitted(pairs: list[LayerPrefix], model: Any) -> list[LayerPrefix | None]:
    """The part of the prefix that each layer takes, for models whose layers differ in size."""
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
