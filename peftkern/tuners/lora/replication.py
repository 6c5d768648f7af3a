"""``layer_replication``: a deeper model whose layers share weights but have their own adapters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...ops.bases import bnb8
from ...ops.bases.formats import is_packed, numbers, reader_of


def _find_layers(model: Any) -> tuple[Any, str, Any]:
    """(module that holds the layers, name of its attribute, the model with the configuration)."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    encoder = getattr(model, "encoder", None)
    for owner, name in ((model, "layers"), (encoder, "layer"), (model, "h")):
        if hasattr(owner, name):
            if isinstance(getattr(owner, name), nn.ModuleList):
                return owner, name, model
            break
    raise ValueError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon "
        "compatible architectures."
    )


def _copy_sharing(layer: nn.Module, index: int) -> nn.Module:
    """A copy of a layer that shares its parameters and has the number ``index``.

    The packed weights of quantised layers are shared too, wherever their owner keeps them.
    """
    shared: dict[int, Any] = {id(p): p for p in layer.parameters()}
    for module in layer.modules():
        if reader_of(module) is bnb8.read:
            bnb8.keep_in_state(module)
        found = numbers(module) if is_packed(module) else ""
        if not isinstance(found, str):
            shared.update((id(t), t) for t in found.packed.tensors)
    clone = copy.deepcopy(layer, shared)
    for module in clone.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return clone


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Stack ranges of a model's layers, in place: [[0, 4], [2, 5]] makes layers 0 1 2 3 2 3 4.

    The copies share all parameters and packed weights, not other buffers: no weights are added.

    Args:
        model: Llama- (``layers``), Bert- (``encoder.layer``) or Falcon-shaped (``h``).
        layer_map: [start, end) ranges.

    Returns:
        A function that puts the layers back as they were.

    Raises:
        ValueError: another architecture, or a range outside of the model's layers.
    """
    owner, attribute, inner = _find_layers(model)
    layers = getattr(owner, attribute)
    for start, end in layer_map:
        if not 0 <= start < end <= len(layers):
            raise ValueError(
                f"`layer_replication` must hold ranges [start, end) of the model's {len(layers)} "
                f"layers, got {[start, end]}"
            )
    order = [i for start, end in layer_map for i in range(start, end)]
    stacked = nn.ModuleList(_copy_sharing(layers[i], n) for n, i in enumerate(order))
    config: Any = getattr(inner, "config", None)
    before = {
        name: getattr(config, name)
        for name in ("num_hidden_layers", "layer_types")
        if getattr(config, name, None) is not None
    }
    after: dict[str, Any] = {"num_hidden_layers": len(stacked)}
    if "layer_types" in before:  # each layer's kind of attention
        after["layer_types"] = [before["layer_types"][i] for i in order]

    put = functools.partial(_put, owner, attribute, config)
    put(stacked, {name: after[name] for name in before})
    return functools.partial(put, layers, before)  # can be pickled with the model that keeps it


def _put(
    owner: Any, attribute: str, config: Any, layers: nn.ModuleList, values: dict[str, Any]
) -> None:
    setattr(owner, attribute, layers)
    for name, value in values.items():
        setattr(config, name, value)


@contextmanager
def stacked(
    model: nn.Module, config: Any, others: Sequence[Any]
) -> Iterator[Callable[[], None] | None]:
    """Stack the model's layers as the configuration says; undone if the block fails.

    Yields the function that undoes it later, or None when there was nothing to stack.
    """
    restore = None
    if is_to_be_stacked(config, others):
        restore = replicate_layers(model, config.layer_replication)
    try:
        yield restore
    except BaseException:
        if restore is not None:
            restore()
        raise


def is_to_be_stacked(config: Any, others: Sequence[Any]) -> bool:
    """True when the model must be stacked for this adapter.

    Raises:
        ValueError: the model has adapters for which it was stacked in another way, or not at all.
    """
    wanted = config.layer_replication
    if not wanted or not others:
        return bool(wanted)
    as_lists = [[list(r) for r in c.layer_replication or ()] for c in (config, *others)]
    if as_lists[0] not in as_lists[1:]:
        raise ValueError(
            f"`layer_replication`={as_lists[0]} does not fit the adapters that the model has: the "
            "layers were stacked, or left, for those. All adapters of a model share its layers."
        )
    return False
