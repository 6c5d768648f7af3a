"""Trained rows of an embedding, or of an output layer whose weight is tied to one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.tracing import is_tracing
from ...utils.zero3 import gathered, whole_shape
from .._buffer_dict import BufferDict
from ..base_layer import BaseTunerLayer


class TrainableTokensLayer(nn.Module, BaseTunerLayer):
    """A frozen embedding W [V, D], or an ``nn.Linear`` with such a weight, with some rows replaced.

    The weight is W' = W with row ``token_indices[name][i]`` replaced by
    ``trainable_tokens_delta[name][i]``. W' is never made. An embedding computes its output with W
    and puts the trained tokens in; a linear layer puts the trained columns in. HF PEFT copies the
    whole of W at every call, and its backward through a tied output layer has a gradient of W's
    size.

    Args:
        base_layer: the embedding, or the linear layer.
        tied_adapter: the layer of the embedding to which this one's weight is tied. This layer then
            shares the names, indices and rows of that one.

    Attributes:
        trainable_tokens_delta: {adapter: trained rows [len(indices), D]}.
        trainable_tokens_original: {adapter: the rows of W that they replace, same shape}.
        token_indices: {adapter: indices}.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    base_layer: Any
    trainable_tokens_delta: nn.ParameterDict
    trainable_tokens_original: BufferDict
    token_indices: dict[str, list[int]]

    def __init__(
        self, base_layer: nn.Module, tied_adapter: TrainableTokensLayer | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # in a list, so that it is not a submodule with a second set of names in the state dict
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        if tied_adapter is None:
            self.trainable_tokens_delta = nn.ParameterDict({})
            self.trainable_tokens_original = BufferDict({}, persistent=False)
            self.token_indices = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
            self.token_indices = tied_adapter.token_indices
        self.merged_adapters = []
        self._merge_calls: list[int] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        # {(adapters, device): the two tensors of _where()}, made when first needed
        self._places: dict[Any, tuple[Tensor, Tensor]]
        self._places = {} if tied_adapter is None else tied_adapter._places
        if isinstance(base_layer, nn.Embedding):
            self.in_features, self.out_features = (
                base_layer.num_embeddings,
                base_layer.embedding_dim,
            )
        else:
            self.out_features, self.in_features = whole_shape(self.base_layer.weight)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        return self._tied_adapter[0] if self._tied_adapter else None

    def update_layer(
        self,
        adapter_name: str,
        token_indices: Sequence[int],
        autocast_dtype: bool = True,
        trainable: bool = True,
    ) -> None:
        """Give the adapter rows of its own, which start as copies of the base weight's.

        Args:
            adapter_name: its name; nothing happens when this layer is tied to another one.
            token_indices: rows of the weight, each in [0, V).
            autocast_dtype: keep the rows in float32 when the weight is float16 or bfloat16.
            trainable: True makes the rows require a gradient.
        """
        if self.tied_adapter is not None:
            return
        weight = self.base_layer.weight
        index = torch.tensor(list(token_indices), dtype=torch.long, device=weight.device)
        with gathered([weight]):
            rows = weight.detach()[index]
        if autocast_dtype and rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        self.token_indices[adapter_name] = list(token_indices)
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows, requires_grad=trainable)
        self.trainable_tokens_original[adapter_name] = rows.clone()
        self._places.clear()

    # ---------------------------------------------------------------- which adapter is in use

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make those of these adapters active that have rows here."""
        super().set_adapter(adapter_names, inference_mode)
        self._active_adapter = [n for n in self._active_adapter if n in self.trainable_tokens_delta]

    def delete_adapter(self, adapter_name: str) -> None:
        for store in (
            self.trainable_tokens_delta,
            self.trainable_tokens_original,
            self.token_indices,
        ):
            if adapter_name in store:
                del store[adapter_name]
        self._places.clear()
        self._active_adapter = [n for n in self.active_adapters if n != adapter_name]

    # ---------------------------------------------------------------- computing

    def _check_overlapping_tokens(self, adapter_names: Sequence[str]) -> None:
        """Raise a ValueError when two of these adapters, or one and a merged one, share a row."""
        seen: set[int] = set()
        for name in dict.fromkeys([*self.merged_adapters, *adapter_names]):
            indices = set(self.token_indices[name])
            if seen & indices:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in "
                    "undefined merging behavior. Only disjunct token indices are currently "
                    "supported."
                )
            seen |= indices

    def _where(self, names: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(index [k], place [V]), both int64, of the rows that these adapters replace.

        ``index`` lists the rows, one adapter after the other. ``place[v]`` is where row v of W
        stands in ``index``, or k when that row is not replaced.
        """
        found = self._places.get((*names, device))
        if found is None or is_tracing():
            self._check_overlapping_tokens(names)
            if is_tracing():  # tensors of a traced graph must not be kept
                return self._look_up(names, device)
            # normal tensors even under inference_mode, as training will use them too
            with torch.inference_mode(False):
                found = self._places[(*names, device)] = self._look_up(names, device)
        return found

    def _look_up(self, names: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        indices = [i for name in names for i in self.token_indices[name]]
        index = torch.tensor(indices, dtype=torch.long, device=device)
        V = whole_shape(self.base_layer.weight)[0]
        place = torch.full((V,), len(indices), dtype=torch.long, device=device)
        place[index] = torch.arange(len(indices), device=device)
        return index, place

    def _rows(self, names: Sequence[str], like: Tensor) -> Tensor:
        """The replaced rows [k, D] of these adapters, in ``like``'s dtype and on its device."""
        rows = [self.trainable_tokens_delta[name].to(like) for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """W' [V, D], a copy of W with the rows of these adapters; W itself when they have none."""
        W: Tensor = self.base_layer.weight
        names = [name for name in active_adapters if name in self.trainable_tokens_delta]
        if not names:
            return W
        index, _ = self._where(names, W.device)
        return W.index_copy(0, index, self._rows(names, W))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def forward_adapters(
        self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The base layer's output for ``x`` with the rows of these adapters in place of W's.

        ``x`` is int64 [...] for an embedding, [..., D] for a linear layer.
        """
        names = [name for name in active_adapters if name in self.trainable_tokens_delta]
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer
        if isinstance(base, nn.Linear):
            return self._linear(base, x, names)
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            # these options depend on the whole weight
            return self._scaled(
                F.embedding(
                    x,
                    self.get_merged_weights(names),
                    base.padding_idx,
                    base.max_norm,
                    base.norm_type,
                    base.scale_grad_by_freq,
                    base.sparse,
                )
            )
        return self._embedding(base, x, names, *args, **kwargs)

    def _embedding(
        self, base: Any, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        y = base(x, *args, **kwargs)
        index, place = self._where(names, x.device)
        rows = self._rows(names, base.weight)
        if base.padding_idx is not None:  # an embedding gives the padding row no gradient
            rows = torch.where((index == base.padding_idx).unsqueeze(1), rows.detach(), rows)
        at = place[x]
        k = len(index)
        new = F.embedding(at, torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), padding_idx=k)
        return torch.where((at < k).unsqueeze(-1), self._scaled(new).to(y.dtype), y)

    def _scaled(self, y: Tensor) -> Tensor:
        """``y`` times the embedding's ``embed_scale``, as in the forward of Gemma's embedding."""
        scale = getattr(self.base_layer, "embed_scale", None)
        if isinstance(scale, Tensor) and scale.numel() != 1:
            warnings.warn(
                f"Found embed_scale attribute with shape {scale.shape}, expected scalar. Embedding "
                "scaling will not be applied.",
                stacklevel=3,
            )
            scale = None
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def _linear(self, base: nn.Linear, x: Tensor, names: Sequence[str]) -> Tensor:
        y = base(x)
        index, _ = self._where(names, x.device)
        bias = None if base.bias is None else base.bias[index]
        new = F.linear(x, self._rows(names, base.weight), bias).to(y.dtype)
        # y is written in place, unless a hook may hold it or it is a leaf
        if base._forward_hooks or (y.requires_grad and y.is_leaf):
            return y.index_copy(-1, index, new)
        return y.index_copy_(-1, index, new)

    # ---------------------------------------------------------------- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' rows into the base weight, in place; :meth:`unmerge` undoes it.

        Args:
            safe_merge: refuse rows that are not finite.
            adapter_names: the adapters; None: the active ones.

        Raises:
            ValueError: two adapters replace the same row, or with ``safe_merge`` a row is not
                finite. The weight is then as it was.
        """
        names = self._check_mergeable(adapter_names, safe_merge)
        for name in names:
            self._write(name, self.trainable_tokens_delta[name])
        if names:
            self.merged_adapters.extend(names)
            self._merge_calls.append(len(names))

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """The adapters that :meth:`merge` would merge; raises its errors."""
        from ..adapter_calls import BROKEN, check_adapters_to_merge

        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.trainable_tokens_delta]
        if names:
            self._check_overlapping_tokens(names)
        for name in names if safe_merge else ():
            if not self.trainable_tokens_delta[name].to(self.base_layer.weight).isfinite().all():
                raise ValueError(BROKEN.format(name))
        return names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write back the rows of the base weight that merged adapters have replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._unmerge_last()

    def _unmerge_last(self) -> None:
        """Undo the last call of :meth:`merge`."""
        for _ in range(self._merge_calls.pop() if self._merge_calls else 1):
            name = self.merged_adapters.pop()
            self._write(name, self.trainable_tokens_original[name])

    @torch.no_grad()
    def _write(self, name: str, rows: Tensor) -> None:
        weight: Any = self.base_layer.weight.data
        index = torch.tensor(self.token_indices[name], dtype=torch.long, device=weight.device)
        weight.index_copy_(0, index, rows.to(weight))
