"""The places of modules in a model: a module may have several names, and is replaced under all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def ends_with_words(key: str, name: str) -> bool:
    """True when ``name`` is ``key`` or its last words.

    ``head`` matches ``model.head`` and ``lm_head``, but not ``overhead``.
    """
    if not name or not key.endswith(name):
        return False
    return len(key) == len(name) or key[-len(name) - 1] in "._" or name[0] in "._"


def places_of(
    model: nn.Module, modules: Iterable[nn.Module]
) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of a module: [(parent, name) of each of its places]}, for each of ``modules``."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(m): [] for m in modules}
    stack, seen = [model], {id(model)}
    while stack:
        parent = stack.pop()
        for name, child in parent._modules.items():
            if child is None:
                continue
            if id(child) in found:
                found[id(child)].append((parent, name))
            if id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    return found


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` in all its places in ``model`` by ``new``, which must not be in it yet."""
    for parent, name in places_of(model, [old])[id(old)]:
        setattr(parent, name, new)


def further_names(model: nn.Module) -> dict[int, list[str]]:
    """{id of a module: its names, the first one first}, for modules with more than one name."""
    stack, seen, shared = [model], {id(model)}, False
    while stack:
        for child in stack.pop()._modules.values():
            if child is None:
                continue
            if id(child) in seen:
                shared = True
                continue
            seen.add(id(child))
            stack.append(child)
    if not shared:
        return {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def outside_of(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """(name, module) of the modules outside of adapter layers and of modules of these ``kinds``.

    Adapter layers are known by their ``base_layer``. The model itself is left out. Each module
    comes once, with its first name.
    """
    stack: list[tuple[str, Any]] = [("", model)]
    seen = set()
    while stack:
        at, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if at:
            yield at, module
        if isinstance(module, kinds) or "base_layer" in module._modules:
            continue
        prefix = f"{at}." if at else ""
        children = [(prefix + n, m) for n, m in module._modules.items() if m is not None]
        stack += reversed(children)
