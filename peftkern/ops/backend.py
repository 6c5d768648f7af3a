"""The choice of the backend that runs the operations; it is made only here.

``PEFTKERN_BACKEND`` is read at the first use: ``torch`` forces torch's own products, ``triton`` the
kernels of ``kernels/``, and ``auto`` (default) takes for each call the fastest way that was
measured on the device (:mod:`.auto_backend`). Without a CUDA device or without triton ``auto`` is
torch, at no cost. A backend is a module with the functions of :class:`Backend`;
:mod:`peftkern.ops.torch_backend` documents what they compute.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..utils.private import is_grad_batch
from . import mlp_torch, torch_backend
from .mlp_parts import NONE, Grads, Lows, Member
from .projection import Plain, PlainGrad, Projection, ProjectionGrad

ENV = "PEFTKERN_BACKEND"
CHOICES = ("auto", "torch", "triton")


class Backend(Protocol):
    """A module that computes; shapes and results are as in :mod:`peftkern.ops.torch_backend`."""

    group_rows: int
    """Up to so many rows, projections of one x without gradients are computed together."""

    def why_not(self, x: Tensor, A: Tensor, /) -> str | None:
        """The reason that a compiler gets the plain formula; None when it gets an operator."""

    def low_rank_dtype(self, x: Tensor, A: Tensor, /) -> torch.dtype: ...

    def draw(self, M: int, K: int, p: float, seed: Tensor, /) -> Tensor: ...

    def forward(
        self, x: Tensor, members: list[Projection], words: list[Tensor | None] | None = None, /
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]: ...

    def backward(
        self,
        x: Tensor,
        members: list[ProjectionGrad],
        needs_x: bool,
        given: list[Tensor] | None = None,
        /,
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

    def infer_group(self, x: Tensor, members: list[Projection], /) -> list[Tensor]: ...

    def mixed(
        self, x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any, /
    ) -> Tensor: ...


class Middle(Protocol):
    """A module that computes an MLP's middle; functions are as in :mod:`.mlp_torch`."""

    def forward(
        self,
        gate: Tensor,
        up: Tensor | None,
        act: str,
        down: Projection | Plain,
        /,
        *,
        inner: Lows = NONE,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def backward(
        self,
        gate: Tensor,
        up: Tensor | None,
        act: str,
        down: ProjectionGrad | PlainGrad,
        members: tuple[Member | None, Member | None],
        copied: bool = False,
        /,
    ) -> tuple[Grads, Tensor | None]: ...


_forced: str | None = None
# The module in use. The first read creates it, by deciding (`__getattr__`). So a decision while a
# model is being compiled does not change a value that exists, which would compile the model again.
active: Backend


def __getattr__(name: str) -> Backend:
    if name == "active":
        return select()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def requested() -> str:
    """The backend that :func:`use_backend`, or else the environment, asks for.

    Raises:
        ValueError: the variable's value is none of ``CHOICES``.
    """
    choice = _forced or os.environ.get(ENV, "auto").lower() or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENV}={choice!r} is no backend; allowed: {', '.join(CHOICES)}")
    return choice


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Force a backend within a block, whatever the environment asks for.

    Args:
        choice: "auto", "torch" or "triton".

    Raises:
        ValueError: the choice is none of these.
        ImportError: ``triton`` was asked for and is not installed.
    """
    global _forced
    before, _forced = _forced, choice
    try:
        select()
        yield
    finally:
        _forced = before
        globals().pop("active", None)


def select() -> Backend:
    """Choose the backend, make it :data:`active` and return it.

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


def behind(dy: Tensor) -> Backend:
    """The backend that computes a backward from dY.

    Of a batch of gradients (``is_grads_batched``) it is torch's, as no kernel reads one.
    """
    return torch_backend if is_grad_batch(dy) else globals().get("active") or select()


def middle(dy: Tensor | None = None) -> Middle:
    """The module that computes an MLP's middle where the active backend computes its linears.

    With dY it is the one of a backward (:func:`behind`).
    """
    used: Any = globals().get("active") or select()
    if used is torch_backend or (dy is not None and is_grad_batch(dy)):
        return mlp_torch
    if used.__name__.endswith("auto_backend"):
        from . import mlp_auto

        return mlp_auto
    from . import mlp_kernels

    return mlp_kernels


def _no_choice() -> str | None:
    """The reason that ``auto`` is only torch here; None when it has a choice."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def describe() -> tuple[str, str]:
    """(backend, reason that it was chosen), for ``explain``."""
    choice = requested()
    if choice == "auto":
        nothing_else = _no_choice()
        return ("torch", f"auto: {nothing_else}") if nothing_else else ("auto", "auto")
    return choice, f"asked for: {ENV}={choice}"
