"""Building modules without memory for their weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class _Here(threading.local):
    skipped = 0  # how many functions of this thread want real weights


_HERE = _Here()


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within the block parameters that modules are given go to the meta device, so that their
    initialisation costs nothing; ``include_buffers``: buffers as well."""
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def empty_parameter(module: nn.Module, name: str, param: Any) -> None:
        register_parameter(module, name, param)
        if param is not None and not _HERE.skipped:
            made = module._parameters[name]
            assert made is not None
            extra = {**made.__dict__, "requires_grad": param.requires_grad}
            module._parameters[name] = type(made)(made.to("meta"), **extra)

    def empty_buffer(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        kept = tensor is None or _HERE.skipped
        register_buffer(module, name, tensor if kept else tensor.to("meta"), persistent)

    try:
        nn.Module.register_parameter = empty_parameter  # type: ignore
        if include_buffers:
            nn.Module.register_buffer = empty_buffer  # type: ignore
        with torch.device("meta") if include_buffers else nullcontext():
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, within which :func:`init_empty_weights` has no effect on parameters."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _HERE.skipped += 1
        try:
            return func(*args, **kwargs)
        finally:
            _HERE.skipped -= 1

    return wrapper
