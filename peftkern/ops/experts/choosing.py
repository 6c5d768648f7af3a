"""Which way computes a mixture: the kernels, or one of torch's own."""

from __future__ import annotations

from .. import backend, torch_backend
from ..notes import note_once
from .parts import Call
from .ways import Choice, of_torch


def choose(call: Call, keep: bool) -> Choice:
    """The way for a call, and the reason; ``keep``: a backward follows."""
    if backend.active is torch_backend:
        return of_torch(call)
    from . import triton_way  # imports triton

    reason = triton_way.why_not(call, keep)
    if reason is not None:
        note_once("a mixture runs on torch's products: %s", reason)
        return of_torch(call)
    if backend.requested() == "triton":
        return Choice(triton_way, "triton", backend.describe()[1])
    from . import auto

    return auto.choose(call, keep)
