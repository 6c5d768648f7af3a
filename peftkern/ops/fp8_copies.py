"""Which base products run in fp8, and whether the kernels make the fp8 copies that they multiply.

The pass that makes S reads X anyway, and writes its fp8 copy; so does the pass over dY for dS and
dB, and in an MLP the passes that make H, dG and dU. A group's X is quantised once. No race decides:
what such a pass saves is a pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .bases.fp8 import Fp8
from .bases.weight import BaseWeight, Packed

# the order of such calls, beside those of triton_backend.PRODUCTS: S and the copies, the products
# in fp8, and then the low-rank parts, as torch's product in fp8 adds to nothing
ORDER = "fp8"


def in_fp8(packed: Packed) -> Fp8 | None:
    """The weight of which products run in fp8; None where they do not."""
    inner = getattr(packed, "inner", packed)
    return inner if isinstance(inner, Fp8) and inner.quantises_input else None


def weight(w: Tensor) -> Fp8:
    """The packed weight of a base weight whose products run in fp8."""
    found = in_fp8(w.packed)  # type: ignore[attr-defined]  # callers have asked `order`
    assert found is not None
    return found


def why_not(w: Fp8) -> str | None:
    """The reason that torch quantises X and dY for it, in passes of their own; None for kernels."""
    if w.block is None:
        return "one scale a row, which is known only after the whole row"
    return None


def order(ws: Iterable[Tensor], how: str | None = None) -> str | None:
    """The order in which kernels compute a call with these base weights.

    It is ``how`` if no product runs in fp8, :data:`ORDER` if the kernels make the copies for all of
    them, and else "joined", whose products are the owners'.
    """
    found, taken = False, True
    for w in ws:
        packed = in_fp8(w.packed) if w.__class__ is BaseWeight else None
        if packed is None:
            taken = False
            continue
        found = True
        taken = taken and why_not(packed) is None
    if not found:
        return how
    return ORDER if taken else "joined"


def describe(packed: Packed) -> str | None:
    """How X and dY of products in fp8 are quantised, in words; None for other products."""
    found = in_fp8(packed)
    if found is None:
        return None
    reason = why_not(found)
    if reason is None:
        return "X and dY quantised in the passes that make S and dS"
    return f"X and dY quantised by torch in passes of their own ({reason})"
