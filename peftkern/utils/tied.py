"""The modules that share their weight with the input embedding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .private import TIED
from .shards import memory_of

# the parts that wrappers and adapter layers add to the name of a weight
_INFIX = re.compile(r"\.(?:token_adapter\.base_layer|original_module|base_layer)(?=\.|$)")


def plain_name(name: str) -> str:
    """A module's or weight's name without the parts that adapter layers and wrappers add."""
    return _INFIX.sub("", name)


def _innermost(model: Any) -> Any:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.model if hasattr(model, "tuner_layer_cls") else model


def modules_tied_to_embedding(model: Any) -> list[str]:
    """Sorted names of the modules of ``model`` that are tied to its input embedding.

    They are listed in ``_tied_weights_keys``: in transformers 5 as {weight: the weight it is tied
    to}, of which only those tied to the input embedding count; before, as a list of weights.

    Returns:
        Names in the present model; those of wrapped modules contain the wrapper's parts. Empty when
        ``config.tie_word_embeddings`` is False.

    Raises:
        ValueError: the list is a mapping, but the model has no ``get_input_embeddings``.
    """
    model = _innermost(model)
    keys = getattr(model, TIED, None)
    if (
        getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False
        or keys is None
    ):
        return []
    if isinstance(keys, dict):
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                "The supplied model implements `_tied_weights_keys` as a dict but doesn't "
                "implement 'get_input_embeddings' so we can't determine which weights are tied to "
                "embeddings."
            )
        keys = _tied_to_embedding(model)
    return sorted({key.rpartition(".")[0] for key in keys})


def embedding_group(model: Any) -> list[tuple[str, nn.Module]]:
    """(plain name, module) of the modules with the input embedding's weight, the embedding first.

    They are known by their storage. A weight on the meta device has none; then they are known by
    being the same parameter, and by the class and its configuration (``_tied_weights_keys``).

    Returns:
        One entry when nothing is tied; none when the model does not name its embedding.
    """
    model = _innermost(model)
    try:
        first: Any = _base_of(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return []
    weight = getattr(first, "_parameters", {}).get("weight")
    if weight is None:
        return []
    found = [
        (plain_name(name), module)
        for name, module in _weighted(model)
        if (other := module._parameters["weight"]) is weight or _same_storage(other, weight)
    ]
    if weight.is_meta:
        known = {id(module) for _, module in found}
        for name in modules_tied_to_embedding(model):
            module = model.get_submodule(name)
            if id(module) not in known:
                found.append((plain_name(name), module))
    return sorted(found, key=lambda item: item[1] is not first)  # keeps the order of the others


def _weighted(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """(name, module) of the modules with a weight, without those that hold adapters' weights.

    (Those are most modules of an adapted model.)
    """
    stack: list[tuple[tuple[str, ...], nn.Module]] = [((), model)]
    seen = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if module._parameters.get("weight") is not None:
            yield ".".join(path), module
        if module._modules:
            kind = type(module)
            inner = getattr(kind, "adapter_layer_names", ()) + getattr(
                kind, "other_param_names", ()
            )
            stack += [
                ((*path, name), child)
                for name, child in reversed(module._modules.items())
                if child is not None and name not in inner
            ]


def _base_of(module: Any) -> Any:
    """The module inside adapter layers and wrappers."""
    while module is not None:
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        inner = inner or module._modules.get("token_adapter")
        if inner is None:
            break
        module = inner
    return module


def _same_storage(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.device != other.device or one.is_meta:
        return False
    return memory_of(one) == memory_of(other) != 0


def _tied_to_embedding(model: Any) -> list[str]:
    """Names of the weights that a mapping ties to the input embedding's weight."""
    mapping: dict[str, str] = {}
    for name, module in model.named_modules():
        own = getattr(module, TIED, None)
        if isinstance(own, dict):
            dot = f"{name}." if name else ""
            mapping.update({dot + key: dot + source for key, source in own.items()})
    weights = {id(p) for p in model.get_input_embeddings().parameters()}
    actual = {
        plain_name(name): name
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in weights
    }
    return [actual.get(key, key) for key, source in mapping.items() if source in actual]


def input_embedding_name(model: Any, default: str | None = None) -> str | None:
    """The name of the input embedding in ``model``; ``default`` when it is not known."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    return name_of(model, model.get_input_embeddings()) or default


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The first name of a module in ``model``; "" when the model does not contain it."""
    return next((name for name, module in model.named_modules() if module is wanted), "")
