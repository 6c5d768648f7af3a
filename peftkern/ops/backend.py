"""Which implementation runs the operations: the one place where that is decided.

``PEFTKERN_BACKEND`` is read at the first use: ``torch`` forces torch's own products, ``triton`` the
kernels of ``kernels/``, and ``auto`` (default) takes, call by call, the fastest that was measured
on the device (:mod:`.auto_backend`); without a CUDA device or without triton that is torch, at no
cost. A backend is a module with the functions of :class:`Backend`; what they compute is written
down in :mod:`peftkern.ops.torch_backend`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from . import torch_backend
from .projection import Projection, ProjectionGrad

ENV = "PEFTKERN_BACKEND"
CHOICES = ("auto", "torch", "triton")


class Backend(Protocol):
    """A module that computes; shapes and meanings as in :mod:`peftkern.ops.torch_backend`."""

    def why_not(self, x: Tensor, A: Tensor, /) -> str | None:
        """Why a compiler gets the plain formula and not an operator of this backend."""

    def low_rank_dtype(self, x: Tensor, A: Tensor, /) -> torch.dtype: ...

    def draw(self, M: int, K: int, p: float, seed: Tensor, /) -> Tensor: ...

    def forward(
        self, x: Tensor, members: list[Projection], words: list[Tensor | None] | None = None, /
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]: ...

    def backward(
        self, x: Tensor, members: list[ProjectionGrad], needs_x: bool, /
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]: ...

    def infer(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        transposed: bool,
        /,
    ) -> Tensor: ...

    def mixed(
        self, x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any, /
    ) -> Tensor: ...


_forced: str | None = None
# The module in use. Not there until somebody reads it, which decides: a decision that falls while
# a model is being compiled is then not a change of state, for which it would be compiled again.
active: Backend


def __getattr__(name: str) -> Backend:
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


def select() -> Backend:
    """Decide on the backend and make it :data:`active`.

    Raises:
        ValueError: the choice is none of ``CHOICES``.
        ImportError: ``triton`` was asked for and is not installed.
    """
    global active
    choice = requested()
    if choice == "triton":
        from . import triton_backend

        active = triton_backend
    elif choice == "auto" and _no_choice() is None:
        from . import auto_backend

        active = auto_backend
    else:
        active = torch_backend
    return active


def _no_choice() -> str | None:
    """Why ``auto`` has nothing but torch here, None when it has."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def describe() -> tuple[str, str]:
    """(backend, why it was taken), for ``explain``."""
    choice = requested()
    if choice == "auto":
        nothing_else = _no_choice()
        return ("torch", f"auto: {nothing_else}") if nothing_else else ("auto", "auto")
    return choice, f"asked for: {ENV}={choice}"
