"""Which implementation runs the operations: the one place where that is decided.

``PEFTKERN_BACKEND`` is read at the first use: ``auto`` (default) takes the fastest that is proven
for the device, ``torch`` forces torch's own products. A backend is a module with ``forward``,
``backward`` and ``infer`` of the signatures in :mod:`peftkern.ops.torch_backend`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

from . import torch_backend

ENV = "PEFTKERN_BACKEND"
CHOICES = ("auto", "torch")

_forced: str | None = None
# the module in use; None until the first operation. Read it as `backend.active or
# backend.select()`.
active: ModuleType | None = None


def requested() -> str:
    """The backend asked for, by :func:`use_backend` or else the environment.

    Raises:
        ValueError: the variable holds something else than one of ``CHOICES``.
    """
    choice = _forced or os.environ.get(ENV, "auto").lower() or "auto"
    if choice not in CHOICES:
        hint = (
            " The Triton backend is not built into this version yet." if choice == "triton" else ""
        )
        raise ValueError(
            f"{ENV}={choice!r} is not a backend of this version; allowed: "
            f"{', '.join(CHOICES)}.{hint}"
        )
    return choice


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Force a backend within a block, whatever the environment says."""
    global _forced, active
    before, _forced = _forced, choice
    try:
        select()
        yield
    finally:
        _forced, active = before, None


def select() -> ModuleType:
    """Decide on the backend and make it :data:`active`. Every choice of this version is torch's."""
    global active
    requested()
    active = torch_backend
    return active


def describe() -> tuple[str, str]:
    """(backend, why it was taken), for ``explain``."""
    choice = requested()
    if choice == "torch":
        return "torch", f"{ENV}=torch"
    return "torch", "the only backend of this version"
