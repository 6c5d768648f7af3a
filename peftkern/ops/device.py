"""Which CUDA device a call is for, and whether that device is recording."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def capturing(x: Tensor) -> bool:
    """Whether what is launched for ``x`` now goes into a CUDA graph."""
    # without an initialised CUDA, x on "cuda" is a FakeTensor
    return x.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def elsewhere(x: Tensor) -> bool:
    """Whether ``x`` is on another CUDA device than the current one."""
    return (
        x.is_cuda and torch.cuda.is_initialized() and x.get_device() != torch.cuda.current_device()
    )


def on_its_device(operation: F) -> F:
    """The operation with its first argument's device made the current one: Triton launches, events
    and streams go there, and a model spread over several devices leaves the first one current."""

    @functools.wraps(operation)
    def there(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if elsewhere(x):
            with torch.cuda.device(x.device):
                return operation(x, *args, **kwargs)
        return operation(x, *args, **kwargs)

    return there  # type: ignore[return-value]
