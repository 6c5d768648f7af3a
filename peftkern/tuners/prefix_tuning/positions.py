"""Positions of own tokens, which come after the prefix: P more than the model would count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...ops.tracing import is_recording
from ...utils.versions import CACHE_LENGTHS, cache_of, parameters_of
from ...utils.zero3 import whole_shape
from .families import Family, at
from .masks import MaskSpec
from .state import PrefixState


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """The input of a call: input_ids [B, T] or inputs_embeds [B, T, d]."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    raise ValueError("You must specify exactly one of input_ids or inputs_embeds")


def move(
    family: Family, stack: PreTrainedModel, kwargs: dict[str, Any], state: PrefixState
) -> None:
    """Add P to the positions of a call of ``stack``, in ``kwargs``.

    Raises:
        ValueError: the last position is beyond those that the model has.
    """
    tokens = tokens_of(kwargs)
    T = tokens.shape[1]
    ids = kwargs.get("position_ids")
    padded = kwargs.get("attention_mask")
    check_room(family, stack, T, state, ids)
    if family.positions in ("none", "table"):
        return
    if ids is not None:
        ids = ids if state.positions_moved else ids + state.offset
        if padded is None and cache_of(stack, kwargs) is None and _is_packed(ids):
            state.positions = ids
        kwargs["position_ids"] = ids
        return
    if family.positions == "tokens" and kwargs.get("input_ids") is not None:
        pad = stack.config.pad_token_id
        real = tokens.ne(pad).long()
        counted = torch.cumsum(real, dim=1) + state.past + state.offset
        kwargs["position_ids"] = counted * real + pad
        return
    if isinstance(padded, MaskSpec):
        padded = padded.padding
    if family.positions == "mask" and padded is not None and padded.dim() == 2:
        real = padded.long()
        counted = torch.cumsum(real, dim=1) - 1 + state.offset
        kwargs["position_ids"] = torch.where(real.bool(), counted, -1)[:, -T:]
        return
    start = stack.config.pad_token_id + 1 if family.positions == "tokens" else 0
    counted = torch.arange(start, start + T, device=tokens.device)[None] + state.past
    kwargs["position_ids"] = counted + state.offset


def _is_packed(ids: Tensor) -> bool:
    """True when positions start again within a row; also in a trace, where values are not known."""
    if is_recording():
        return True
    return bool((torch.diff(ids, dim=-1) != 1).any())


def check_room(
    family: Family, stack: PreTrainedModel, T: int, state: PrefixState, ids: Tensor | None
) -> None:
    if family.table is None or isinstance(state.past, Tensor):
        return
    room = _room(family, stack)
    need = state.virtual + state.past + T
    if room is None or need <= room:
        return
    if ids is not None and int(ids.max()) + (0 if state.positions_moved else state.virtual) < room:
        return  # with padding on the left the positions are smaller than the places in the row
    name = "max_seq_len" if family.table == "max_seq_len" else "max_position_embeddings"
    raise ValueError(
        f"{state.virtual} virtual tokens and {state.past + T} tokens need {need} positions; "
        f"{type(stack).__name__} has {room} ({name})"
    )


def _room(family: Family, stack: PreTrainedModel) -> int | None:
    """The number of positions that the model has; None without a limit."""
    assert family.table is not None
    table: Any = at(stack, family.table)
    if not isinstance(table, nn.Module):
        if "." in family.table:  # this model has no such table
            return None
        return int(getattr(stack.config, family.table))
    weight: Any = getattr(table, "weight", None)
    if weight is None:  # positions are computed
        return None
    rows = whole_shape(weight)[0] - int(getattr(table, "offset", 0))
    if family.positions == "tokens":
        rows -= stack.config.pad_token_id + 1  # positions begin after the padding token's
    return rows


def move_in_table(
    table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], offset: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for a call of ``embed_positions`` with positions moved by ``offset``.

    BART's is given the positions, M2M-100's counts them from the number of earlier tokens.
    """
    names = parameters_of(table)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    name = next((n for n in ("position_ids", *CACHE_LENGTHS) if n in names), None)
    if name is None or kwargs.get(name) is None:
        wanted = name or "position_ids"
        raise RuntimeError(f"embed_positions was called without the {wanted} to move")
    kwargs[name] = kwargs[name] + offset
    return (), kwargs
