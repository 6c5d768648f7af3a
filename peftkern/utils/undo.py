"""Bringing a model back to what it was before a call that failed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .module_tree import parameters_of


def remember_requires_grad(model: nn.Module) -> Callable[[], None]:
    """What makes every parameter that ``model`` has now train, or not, as it does now."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters_of(model)]

    def put_back() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    return put_back


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block ``model`` is in training or in evaluation mode; afterwards it is in its
    former one, and so is each of its modules."""
    before, modes = model.training, [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(before)  # which modules may have a method for
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def remember(model: nn.Module) -> Callable[[], None]:
    """What puts every module of ``model`` back to its present state: children, tensors (the same
    objects), hooks, flags and settings. Values that were changed within a tensor stay changed."""
    put_flags_back = remember_requires_grad(model)
    states = []
    for module in model.modules():
        # a module's dicts, lists and sets are changed in place, so each is copied
        inner = [
            (v, copy.copy(v)) for v in vars(module).values() if isinstance(v, (dict, list, set))
        ]
        states.append((module, dict(vars(module)), inner))

    def put_back() -> None:
        for module, attributes, inner in states:
            vars(module).clear()
            vars(module).update(attributes)
            for here, was in inner:
                here.clear()
                if isinstance(here, list):
                    here.extend(was)
                else:
                    here.update(was)
        put_flags_back()

    return put_back


@contextmanager
def unchanged_on_error(model: Any, when: bool = True) -> Iterator[None]:
    """After an error within the block ``model`` is as it was before, see :func:`remember`; not
    ``when``: the block cares for that itself."""
    put_back = remember(model) if when else None
    try:
        yield
    except BaseException:
        if put_back is not None:
            put_back()
        raise
