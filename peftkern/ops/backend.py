"""Which implementation runs the operations: the one place where that is decided.

``PEFTKERN_BACKEND`` is read at the first use: ``torch`` forces torch's own products, ``triton`` the
kernels of ``kernels/``, and ``auto`` (default) takes the fastest that was measured on the device.
No GPU measurement exists yet, so ``auto`` is torch everywhere. A backend is a module with
``forward``, ``backward``, ``infer``, ``draw`` and ``low_rank_dtype`` of the signatures in
:mod:`peftkern.ops.torch_backend`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

from . import torch_backend

ENV = "PEFTKERN_BACKEND"
CHOICES = ("auto", "torch", "triton")

_forced: str | None = None
# The module in use. Not there until somebody reads it, which decides: a decision that falls while
# a model is being compiled is then not a change of state, for which it would be compiled again.
active: ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "active":
        return select()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def requested() -> str:
    """The backend asked for, by :func:`use_backend` or else the environment.

    Raises:
        ValueError: the variable holds something else than one of ``CHOICES``.
    """
    choice = _forced or os.environ.get(ENV, "auto").lower() or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENV}={choice!r} is no backend; allowed: {', '.join(CHOICES)}")
    return choice


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Force a backend within a block, whatever the environment says."""
    global _forced
    before, _forced = _forced, choice
    try:
        select()
        yield
    finally:
        _forced = before
        globals().pop("active", None)


def select() -> ModuleType:
    """Decide on the backend and make it :data:`active`.

    Raises:
        ValueError: the choice is none of ``CHOICES``.
        ImportError: ``triton`` was asked for and is not installed.
    """
    global active
    if requested() == "triton":
        from . import triton_backend

        active = triton_backend
    else:
        active = torch_backend
    return active


def describe() -> tuple[str, str]:
    """(backend, why it was taken), for ``explain``."""
    choice = requested()
    if choice == "auto":
        return "torch", "auto: torch until the Triton kernels are measured"
    return choice, f"asked for: {ENV}={choice}"
