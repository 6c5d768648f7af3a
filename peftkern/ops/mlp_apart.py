"""G and U of an MLP without their low-rank parts, which the kernels of its middle add as they read.

torch's product in fp8 adds to nothing, so that a pass would read and write G and U for S Bᵀ alone.
Both directions add it to the tiles that they read; the backward gets S of both for that.
"""

from __future__ import annotations

from torch import Tensor

from . import backend as _backend
from . import fp8_copies, torch_backend
from .projection import Plain, Projection


def outputs(
    x: Tensor, inner: list[Projection | Plain], act: str, down: Projection | Plain
) -> list[tuple[Tensor, Tensor, Tensor | None]] | None:
    """(X Wᵀ, S, mask) of gate and up for x [M, K]; None where they are to have all of their sums.

    So it is where a base product is not in fp8 by the kernels, a linear has a bias or no adapter,
    or a rank is too large for the kernel of the gradients.
    """
    used = _backend.active
    if used is torch_backend:
        return None
    members = []
    for part in inner:
        if not isinstance(part, Projection) or part.bias is not None:
            return None
        members.append(part)
    if not isinstance(down, Projection):
        return None
    ws = [m.weight for m in (*members, down)]
    if fp8_copies.order(ws) != fp8_copies.ORDER:
        return None
    from . import auto_backend, mlp_triton, triton_backend

    As, behind = [m.A for m in members], [m.B.t() for m in members]
    if mlp_triton.why_not(x, act, [*As, *behind, down.A]) is not None:
        return None
    if not mlp_triton.adds(x, [t.shape[0] for t in (*As, down.A)]):
        return None
    if used is auto_backend and not auto_backend.in_fp8("forward", x, ws[:-1], As):
        return None
    done: list[tuple[Tensor, Tensor, Tensor | None]] = triton_backend.forward(
        x, members, apart=True
    )
    return done
