"""Queries of the CUDA device that a call is for, and a decorator that makes it current."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def capturing(x: Tensor) -> bool:
    """True when launches for ``x`` are being captured in a CUDA graph."""
    # without an initialised CUDA, x on "cuda" is a FakeTensor
    return x.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_loaded(kind: object, x: Tensor, loaded: set[Any]) -> bool:
    """True for a kind of call whose kernels are loaded when it has run; it is noted in ``loaded``.

    A CUDA graph's capture forbids to load a kernel, so there a new kind of call has to go another
    way.
    """
    if kind not in loaded:
        if capturing(x):
            return False
        loaded.add(kind)
    return True


def elsewhere(x: Tensor) -> bool:
    """True when ``x`` is on another CUDA device than the current one."""
    return (
        x.is_cuda and torch.cuda.is_initialized() and x.get_device() != torch.cuda.current_device()
    )


def on_its_device(operation: F) -> F:
    """A decorator that makes the device of an operation's first argument current while it runs.

    Triton's launches, events and streams use the current device, and in a model that is spread over
    several devices that is always the first one.
    """

    @functools.wraps(operation)
    def there(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if elsewhere(x):
            with torch.cuda.device(x.device):
                return operation(x, *args, **kwargs)
        return operation(x, *args, **kwargs)

    return there  # type: ignore[return-value]
