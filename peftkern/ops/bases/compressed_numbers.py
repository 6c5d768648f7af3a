"""The numbers that compressed-tensors packs: integers of 4 and 8 bits, and FP4 (NVFP4, MXFP4).

integers    W = (q - z) · s                    a scale and zero point for a tensor, row or group
NVFP4       W = e2m1(q) · (s / s_global)       s in e4m3 for 16 elements
MXFP4       W = e2m1(q) · 2^(s - 127)          s in a byte for 32 elements
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fp8_numbers import scale_
from .mx import pairs_of_bytes, powers
from .weight import Packed

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

_PAIRS = pairs_of_bytes(torch.float32, torch.device("cpu"))


class PackedInt(Packed):
    """Integers [N, K], as int8 or ``bits`` bits each in int32.

    Args:
        q: int8 [N, K], or int32 [N, ceil(K · bits / 32)].
        bits: 4 or 8; None for int8.
        shape: (N, K).
        scale: one element, [N, 1], or [N, K / group] with ``block`` (1, group), or of blocks.
        zero: zero points in the shape of ``scale``, or None.
        block: rows and columns to a scale.
        name: the format, for ``explain``.
    """

    __slots__ = ("q", "bits", "scale", "zero", "block", "shape", "device", "format")

    def __init__(
        self,
        q: Tensor,
        bits: int | None,
        shape: tuple[int, int],
        scale: Tensor,
        zero: Tensor | None,
        block: tuple[int, int] | None,
        name: str,
    ) -> None:
        self.q, self.bits, self.scale, self.zero, self.block = q, bits, scale, zero, block
        self.shape, self.device, self.format = shape, q.device, name

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.q, self.scale

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import packed_rows, scaled

        rows, columns = self.block or (1, 0)
        scale = self.scale.reshape(1, 1) if self.scale.numel() == 1 else self.scale
        if self.bits is None and self.zero is None:
            rows, columns = (0, 0) if scale.numel() == 1 else (rows, columns)
            return scaled(self.q.data, scale.data, (rows, columns), through=scale.dtype)
        if self.bits != 4 or self.shape[1] % 8 or rows != 1 or scale.shape[0] != self.shape[0]:
            return f"integers of {self.bits} bits with scales {tuple(scale.shape)}"
        made = packed_rows(self.q.data, scale.data, columns)
        # zero points are less 8, as the owner reads the numbers
        return made if self.zero is None else made._replace(zeros=self.zero.t())

    def dense(self, dtype: torch.dtype) -> Tensor:
        q = self.q if self.bits is None else unpacked(self.q, self.bits, self.shape[1])
        kept = self.scale.dtype
        wide = torch.promote_types(kept, torch.float32)
        w = q.to(wide)
        if self.zero is not None:
            w.sub_(_spread(self.zero.to(wide), self.shape, self.block))
        return scale_(w, self.scale.to(wide), self.block).to(kept).to(dtype)


def _spread(t: Tensor, shape: tuple[int, int], block: tuple[int, int] | None) -> Tensor:
    if block is None or t.numel() == 1:
        return t
    N, K = shape
    return t.repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]


def unpacked(words: Tensor, bits: int, K: int) -> Tensor:
    """The integers int8 [N, K] in int32 [N, ceil(K · bits / 32)], lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets ^ 128).view(torch.int8)[:, :K]
    pair = torch.stack((octets & 15, octets >> 4), -1)
    return pair.view(torch.int8).flatten(1)[:, :K] - 8


class PackedFloat4(Packed):
    """e2m1 numbers [N, K], two in a byte, with a scale for ``group`` of a row.

    Args:
        q: uint8 [N, K / 2].
        scale: [N, K / group] in e4m3, or the exponents of powers of two in uint8.
        whole: the scale of all scales [1] or None.
        group: elements to a scale.
        name: the format, for ``explain``.
    """

    __slots__ = ("q", "scale", "whole", "group", "shape", "device", "format")

    def __init__(
        self, q: Tensor, scale: Tensor, whole: Tensor | None, group: int, name: str
    ) -> None:
        self.q, self.scale, self.whole, self.group = q, scale, whole, group
        self.shape, self.device = (q.shape[0], 2 * q.shape[1]), q.device
        self.format = ("NVFP4, " if whole is not None else "MXFP4, ") + name

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.q, self.scale) if self.whole is None else (self.q, self.scale, self.whole)

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import mxfp4, nvfp4

        q, scale, whole = self.q.data, self.scale.data, self.whole
        if scale.dtype == torch.uint8 and whole is None and self.group == 32:
            made = mxfp4(q, scale)
        elif scale.dtype == torch.float8_e4m3fn and whole is not None and self.group == 16:
            made = nvfp4(q, scale, whole.data.float())
        else:
            return f"scales in {scale.dtype} for {self.group} numbers"
        return made._replace(layout=made.layout._replace(through="bfloat16"))

    def dense(self, dtype: torch.dtype) -> Tensor:
        pairs = _PAIRS if self.q.is_cpu else _PAIRS.to(self.q.device)
        w = pairs.index_select(0, self.q.flatten().int()).view(self.shape)
        if self.scale.dtype == torch.uint8:
            scale = powers(self.scale, torch.float32)
        else:
            scale = self.scale.float()
        if self.whole is not None:
            scale = scale / self.whole
        return scale_(w, scale, (1, self.group)).to(torch.bfloat16).to(dtype)  # as the owner does
