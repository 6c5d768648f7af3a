"""MXFP4: 4-bit floating point with a power of two for each 32 elements of a row.

    w_nk = code[q_nk] · 2^(s_n,k//32 - 127)     two q in a byte, the first in its low half

(Open Compute Project, Microscaling Formats, 2023: E2M1 elements, E8M0 scales.) gpt-oss' experts are
kept so, and those of fp8 checkpoints with ``expert_dtype="fp4"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .weight import Packed

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

BLOCK = 32
# of E2M1, by the code; bit 3 is the sign
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Mx4(Packed):
    """A weight [N, K] in MXFP4.

    Args:
        bits: uint8 or int8 [N, K / 2].
        scale: E8M0 as uint8 or ``float8_e8m0fnu``, or powers of two in float32; [N, K / 32].
    """

    __slots__ = ("bits", "scale", "shape", "device")
    format = "MXFP4"

    def __init__(self, bits: Tensor, scale: Tensor) -> None:
        self.bits, self.scale, self.device = bits, scale, bits.device
        self.shape = (bits.shape[0], 2 * bits.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.bits, self.scale

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import mxfp4

        if self.scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            return f"its scales are {self.scale.dtype}"
        return mxfp4(self.bits.data.view(torch.uint8), self.scale.data.view(torch.uint8))

    def dense(self, dtype: torch.dtype) -> Tensor:
        N, K = self.shape
        # codes and powers of two are exact in bf16 and wider; float16 has too few exponents
        wide = torch.float32 if dtype == torch.float16 else dtype
        pairs = pairs_of_bytes(wide, self.device)
        w = pairs.index_select(0, self.bits.reshape(-1).view(torch.uint8).int())
        w = w.view(N, -1, BLOCK).mul_(powers(self.scale, wide)[:, :, None]).view(N, K)
        return w if wide == dtype else w.to(dtype)


def pairs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: the two numbers in each byte."""
    values = torch.tensor(VALUES, dtype=dtype, device=device)
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)


def powers(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What scales in E8M0 (or already powers of two) multiply with, in ``dtype``."""
    if scale.dtype == torch.uint8:  # 255 is NaN
        exponents = scale.to(torch.int32) - 127
        found = torch.ldexp(torch.ones_like(scale, dtype=dtype), exponents)
        return found.masked_fill_(scale == 255, float("nan"))
    return scale.to(dtype)


def shape_error(bits: Tensor, scale: Tensor) -> str | None:
    """The reason that scales [..., N, K / 32] do not fit packed bits [..., N, K / 2], or None."""
    wanted = (*bits.shape[:-1], bits.shape[-1] * 2 // BLOCK)
    if bits.shape[-1] * 2 % BLOCK or tuple(scale.shape) != wanted:
        return (
            f"its scales are of shape {tuple(scale.shape)}, and packed weights of shape "
            f"{tuple(bits.shape)} need {wanted}"
        )
    return None
