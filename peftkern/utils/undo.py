"""Restoring a model to its state before a call that failed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .module_tree import parameters_of


def remember_requires_grad(model: nn.Module) -> Callable[[], None]:
    """A function that gives every parameter of ``model`` its present ``requires_grad`` again."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters_of(model)]

    def put_back() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    return put_back


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put ``model`` in training or evaluation mode within the block.

    Afterwards it and each of its modules have their former mode again.
    """
    before, modes = model.training, [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        model.train(before)  # called first, as a module may have its own train()
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def remember(model: nn.Module) -> Callable[[], None]:
    """A function that restores every module of ``model`` to its present state.

    That is its children, tensors (the same objects), hooks, flags and settings. Values that were
    changed inside a tensor stay changed.
    """
    put_flags_back = remember_requires_grad(model)
    states = []
    for module in model.modules():
        # copies of a module's dicts, lists and sets, as these are changed in place
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
    """A context that restores ``model`` after an error inside it, see :func:`remember`.

    With ``when=False`` it does nothing, for code that restores the model itself.
    """
    put_back = remember(model) if when else None
    try:
        yield
    except BaseException:
        if put_back is not None:
            put_back()
        raise
