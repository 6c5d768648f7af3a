"""NF4 and FP4 as bitsandbytes packs them (Dettmers et al., 2023, arXiv 2305.14314, section 3).

    w_i = code[q_i] · absmax[i // blocksize]     two 4-bit q in a byte, the first in its high half

With nested statistics absmax is itself quantised, in blocks of 256: absmax = code2[q2] · absmax2 +
offset. A ``Linear4bit`` keeps all this in its weight's ``quant_state``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import Found
from .repack import State
from .weight import Packed


class Bnb4(Packed):
    """A weight of ``bitsandbytes.nn.Linear4bit``."""

    __slots__ = ("bits", "state", "fixed", "shape", "device", "format")

    def __init__(self, bits: Tensor, state: Any, fixed: torch.dtype | None) -> None:
        self.bits, self.state, self.fixed = bits, state, fixed
        self.shape, self.device = tuple(state.shape), bits.device
        self.format = f"{state.quant_type.upper()} (bitsandbytes)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        state = self.state
        held = (self.bits, state.absmax)
        return held + ((state.state2.absmax, state.offset) if state.nested else ())

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.fixed is None else self.fixed

    def dense(self, dtype: torch.dtype) -> Tensor:
        state, ops = self.state, torch.ops.bitsandbytes
        absmax = state.absmax
        if state.nested:
            inner = state.state2
            absmax = ops.dequantize_blockwise.default(
                absmax, inner.absmax, inner.code, inner.blocksize, inner.dtype
            )
            absmax = absmax + state.offset
        narrow = dtype if dtype in _DTYPES else torch.float32
        w: Tensor = ops.dequantize_4bit.default(
            self.bits, absmax.float(), state.blocksize, state.quant_type, state.shape, narrow
        )
        return w if narrow == dtype else w.to(dtype)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read(module: Any) -> Found | str:
    """The weight of a ``Linear4bit``, or the reason that it cannot be read."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if weight is None or weight.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if state is None:
        return "its 4-bit weight has no statistics: it is quantised when it is moved to a device"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed its weight anew for this processor, in an eval forward"
    if len(state.shape) != 2:
        return f"its 4-bit weight is of shape {tuple(state.shape)}"
    return Found(Bnb4(weight, state, _fixed(module)), module._parameters.get("bias"))


def _fixed(module: Any) -> torch.dtype | None:
    """The dtype that the layer computes in; None for x's, as its first forward would decide."""
    given: torch.dtype | None = module.compute_dtype
    return given if module.compute_type_is_set else None


def repacked(module: Any, weight: Tensor) -> State:
    """What a ``Linear4bit`` holds for another weight [N, K], with the settings of the present one.

    The owner's ``Params4bit`` quantises when it is moved to its device.
    """
    old = module.weight
    state = getattr(old, "quant_state", None) or module.quant_state
    made = type(old)(
        weight.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
    ).to(old.device)
    made.module = old.module  # not before: it would be given the new statistics at once
    return State({"weight": made, "quant_state": made.quant_state})
