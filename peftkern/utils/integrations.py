"""``init_empty_weights``: builds modules without memory for their weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class _Here(threading.local):
    skipped = 0  # number of this thread's running functions that need real weights
    parameters = 0  # number of this thread's open contexts
    buffers = 0  # number of those that are for buffers too


_HERE = _Here()
# all threads share nn.Module: the first context changes it and the last one restores it
_LOCK = threading.Lock()
_open = 0
_real: tuple[Any, Any] = (nn.Module.register_parameter, nn.Module.register_buffer)


def _register_parameter(module: nn.Module, name: str, param: Any) -> None:
    _real[0](module, name, param)
    if param is not None and _HERE.parameters and not _HERE.skipped:
        made = module._parameters[name]
        assert made is not None
        extra = {**made.__dict__, "requires_grad": param.requires_grad}
        module._parameters[name] = type(made)(made.to("meta"), **extra)


def _register_buffer(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
    kept = tensor is None or _HERE.skipped or not _HERE.buffers
    _real[1](module, name, tensor if kept else tensor.to("meta"), persistent)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """A context in which this thread's new parameters of modules go to the meta device.

    Their initialisation then costs nothing. With ``include_buffers`` buffers go there too.
    """
    global _open, _real
    patched: Any = nn.Module  # Any, as a type checker forbids replacing its methods
    with _LOCK:
        if not _open:
            _real = nn.Module.register_parameter, nn.Module.register_buffer
            patched.register_parameter = _register_parameter
            patched.register_buffer = _register_buffer
        _open += 1
    _HERE.parameters += 1
    _HERE.buffers += bool(include_buffers)
    try:
        with torch.device("meta") if include_buffers else nullcontext():
            yield
    finally:
        _HERE.parameters -= 1
        _HERE.buffers -= bool(include_buffers)
        with _LOCK:
            _open -= 1
            if not _open:
                patched.register_parameter, patched.register_buffer = _real


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of ``func`` in which :func:`init_empty_weights` does not affect parameters."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _HERE.skipped += 1
        try:
            return func(*args, **kwargs)
        finally:
            _HERE.skipped -= 1

    return wrapper
