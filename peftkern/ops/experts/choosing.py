"""Which way computes a mixture: the kernels, or one of torch's own; and words for that."""

from __future__ import annotations

from .. import backend, torch_backend
from ..notes import note_once
from .parts import Call
from .ways import Choice, of_torch

_NAMED = {
    "triton": "the kernels",
    "grouped": "torch's grouped products",
    "loop": "a loop over the experts",
}


def choose(call: Call, keep: bool) -> Choice:
    """The way for a call, and the reason; ``keep``: a backward follows."""
    found = _without_race(call, keep)
    if found is None:
        from . import auto

        return auto.choose(call, keep)
    if found.declined is not None:
        note_once("a mixture runs on torch's products: %s", found.declined)
    return found


def _without_race(call: Call, keep: bool) -> Choice | None:
    """The way for a call by its facts alone; None where a race between ways decides."""
    if backend.active is torch_backend:
        return of_torch(call)
    from . import triton_way  # imports triton

    reason = triton_way.why_not(call, keep)
    if reason is not None:
        return of_torch(call)._replace(declined=reason)
    if backend.requested() == "triton":
        return Choice(triton_way, "triton", backend.describe()[1])
    return None


def describe(call: Call) -> str:
    """The way of calls with the linears, the gate and the norm of ``call``, for ``explain``.

    The number of its tokens and choices may be zero: no way depends on them but by races.
    """
    plain, step = (_in_words(call, keep) for keep in (False, True))
    return plain if plain == step else f"{plain}; with gradients {step}"


def _in_words(call: Call, keep: bool) -> str:
    found = _without_race(call, keep)
    if found is None:
        from . import auto

        return auto.describe(call)
    words = f"{_NAMED[found.name]} ({found.reason})"
    if found.declined is not None:
        words += f", as the kernels decline: {found.declined}"
    return words
