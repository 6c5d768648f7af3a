"""``TrainableTokensWrapper``: a module whose trained tokens belong to an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.handing import HERE, TokenNames, hand_over
from ...utils.module_tree import set_layer_requires_grad
from ..base_layer import BaseTunerLayer
from ..modules_to_save import CONTAINERS, AuxiliaryTrainingWrapper
from .layer import TrainableTokensLayer


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding, or an output layer tied to one, of which adapters train rows by token.

    The rows are in ``token_adapter``, a :class:`TrainableTokensLayer`. A file holds them as
    ``….token_adapter.trainable_tokens_delta``; of a layer that is tied to another it holds nothing.

    Args:
        module_to_save: the module.
        tied_adapter: the token adapter of the embedding to which the module's weight is tied.

    Raises:
        TypeError: the module is a container, or an adapter layer.
    """

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = (
        "token_adapter.token_indices",
        "token_adapter.trainable_tokens_original",
    )
    token_adapter: TrainableTokensLayer

    def __init__(
        self, module_to_save: nn.Module, tied_adapter: TrainableTokensLayer | None = None
    ) -> None:
        super().__init__()
        check_wrappable(module_to_save)
        self._active_adapter = []
        self._disable_adapters = False
        self.token_adapter = TrainableTokensLayer(module_to_save, tied_adapter)
        self.training = module_to_save.training
        self.token_adapter.training = module_to_save.training

    # properties: as attributes they would give the module a second name in the state dict, and the
    # adapters a second list
    original_module: Any = property(lambda self: self.token_adapter.base_layer)
    _adapters: Any = property(lambda self: self._get_available_adapters())

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.trainable_tokens_delta.keys())

    def update(self, adapter_name: str, token_indices: Sequence[int], **how: Any) -> None:
        """Give the adapter rows here, if it has none: :meth:`TrainableTokensLayer.update_layer`."""
        if adapter_name not in self._get_available_adapters():
            self.token_adapter.update_layer(adapter_name, token_indices, **how)

    def __getattr__(self, name: str) -> Any:
        """The module's attribute; for ``weight``, the weight with the active adapter's rows."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            adapter = self.__dict__.get("_modules", {}).get("token_adapter")
            if adapter is None:
                raise
        if name == "weight" and not self._disable_adapters and not adapter.merged:
            return adapter.get_merged_weights(self.active_adapters)
        return getattr(adapter.base_layer, name)

    # ---------------------------------------------------------------- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None or self._disable_adapters:
            return self.token_adapter(*args, **kwargs)
        if isinstance(adapter_names, TokenNames):
            return adapter_names.over(self._mixed_batch, *args, **kwargs)
        return self._mixed_batch(*args, adapter_names=adapter_names, **kwargs)

    def _mixed_batch(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any
    ) -> Tensor:
        """Run row i of the batch with the rows of ``adapter_names[i]``."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        have = self._get_available_adapters()
        batch: dict[str | None, list[int]] = {}
        for i, name in enumerate(adapter_names):
            batch.setdefault(name if name in have else None, []).append(i)
        parts = [
            self.token_adapter.forward_adapters(
                x[index], [] if name is None else [name], *args, **kwargs
            )
            for name, index in batch.items()
        ]
        order = torch.tensor([i for index in batch.values() for i in index], device=x.device)
        return torch.cat(parts)[order.argsort()]

    # ---------------------------------------------------------------- which adapter is in use

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use the rows of these adapters, which must not share a token; with none, the base's.

        Raises:
            ValueError: an unknown adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        have = self._get_available_adapters()
        for name in names:
            if name not in have:
                raise ValueError(f"Adapter {name} not found in {sorted(have)}")
        self._active_adapter = names
        self.token_adapter.set_adapter(names, inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, rows in self.token_adapter.trainable_tokens_delta.items():
            if name in names:
                set_layer_requires_grad(rows, requires_grad)

    def delete_adapter(
        self, adapter_name: str, new_active_adapters: Sequence[str] | None = None
    ) -> None:
        """Drop the adapter's rows; ``new_active_adapters`` are those that all layers use next."""
        if adapter_name not in self._get_available_adapters():
            return
        names = list(new_active_adapters or ())
        if len(names) > 1:
            raise ValueError(
                f"Attempted to set multiple ({names}) adapters at once for "
                f"{type(self).__name__}, which is not allowed."
            )
        self.token_adapter.delete_adapter(adapter_name)
        if new_active_adapters is None:
            names = [n for n in self.active_adapters if n != adapter_name]
        have = self._get_available_adapters()
        self.set_adapter([n for n in names if n in have])

    # ---------------------------------------------------------------- files, and taking it out

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{name in a file: name in the state dict}, both without this module's own name."""
        if (
            self.token_adapter.tied_adapter is not None
            or adapter_name not in self._get_available_adapters()
        ):
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def adapter_state_dict(
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """This module's tensors for a file, taken from a state dict of this module."""
        return {k: state_dict[v] for k, v in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module; with ``merge``, with the adapters' rows in its weight."""
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.get_base_layer()


def check_wrappable(module: nn.Module) -> None:
    """Raise a TypeError for a module whose tokens cannot be trained."""
    if isinstance(module, (*CONTAINERS, BaseTunerLayer)):
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {type(module)}"
        )
    base = module.original_module if isinstance(module, TrainableTokensWrapper) else module
    if not isinstance(base, (nn.Embedding, nn.Linear)):
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {type(module)}, only to "
            "embeddings and to output layers"
        )
