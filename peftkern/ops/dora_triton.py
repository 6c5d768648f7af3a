"""DoRA's linear on the Triton kernels: formulas in :mod:`.dora`, signatures in :mod:`.dora_torch`.

The products are plain LoRA's, in the order that its backend takes. If that is one kernel for base
and update, its epilogue applies the gain; after the vendor's product one more pass does. The
backward scales dY in the pass that sums dY ∘ (V - bias), and LoRA's backward takes the result.
Dropout needs a second base product, and runs on torch's.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.common import INTERPRET
from ..kernels.dora_grad import scale_grad
from ..kernels.dora_norm import row_norms
from ..kernels.gemm import fused_linear
from ..kernels.shrink import shrink
from . import backend as _backend
from . import dora_torch, triton_backend, tuned
from .device import on_its_device
from .projection import Projection, ProjectionGrad
from .quantised_triton import dense
from .triton_backend import refusal, why_not

__all__ = ["backward", "forward", "norms", "why_no_norms", "why_not"]


def why_no_norms(weight: Tensor, A: Tensor, B: Tensor) -> str | None:
    """The reason that :func:`norms` does not take these tensors; None when it does."""
    if weight.is_meta or not (weight.is_cuda or INTERPRET.value):
        return f"the weight is on {weight.device.type}"
    return refusal(weight, A.dtype, A.shape[0]) or refusal(weight, B.dtype, A.shape[0])


@on_its_device
def norms(weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """The result of :func:`.dora_norm.row_norms`, in one launch or two."""
    found: Tensor = row_norms(weight.t() if transposed else weight, A, B, scale)
    return found


@on_its_device
def forward(
    x: Tensor, member: Projection, gain: Tensor, keep_v: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(Y, S, V or None without ``keep_v``, the mask); the first three are in x's dtype."""
    if member.p > 0.0:
        return dora_torch.forward(x, member, gain, keep_v)
    w, bias, A, B = member.w, member.bias, member.A, member.B
    if _backend.active is triton_backend and _order(x, w, A) == "fused":
        (N, r), K = B.shape, x.shape[1]
        s = shrink(x, [A], [member.scale], config=tuned.config("shrink", x, A.dtype, 0, K, r))
        v = x.new_empty((x.shape[0], N)) if keep_v else None
        # no config from a tuning table: its tile is for products without gain, with fewer registers
        y = fused_linear(x, dense(w).t(), s, B, bias, gain=gain.float(), v=v)
        return y, s, v, None
    [(v, s, _)] = _backend.active.forward(x, [member])
    return dora_torch.scale_columns(v, gain, bias, keep_v), s, v if keep_v else None, None


def _order(x: Tensor, w: Tensor, A: Tensor) -> str:
    group = triton_backend._Group(x, A.dtype, [A.shape[0]], False)
    return group.order(None, w.shape[1], w.shape[0])


@on_its_device
def backward(
    x: Tensor,
    member: ProjectionGrad,
    bias: Tensor | None,
    gain: Tensor,
    v: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB, sums over rows of dY ∘ (V - bias)), with None for those not wanted.

    The sums are None without ``v``.
    """
    if member.bits is not None:
        return dora_torch.backward(x, member, bias, gain, v, needs_x)
    wanted = needs_x or member.needs_a or member.needs_b
    scaled, sums = scale_grad(member.dy, gain.float(), v, bias, wanted=wanted)
    if scaled is None:
        return None, None, None, sums
    dx, [(da, db)] = _backend.active.backward(x, [member._replace(dy=scaled)], needs_x)
    return dx, da, db, sums
