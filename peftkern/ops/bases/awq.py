"""AWQ (Lin et al., 2023, arXiv 2306.00978) in the GEMM layout, of autoawq and gptqmodel.

    W[n, k] = (codes[k, n] - zeros[g, n]) · scales[g, n],  g = k // group_size

``qweight`` [K, N · bits / 32] and ``qzeros`` [groups, N · bits / 32] pack along N; with 4 bits the
eight codes of a word stand in the order 0, 2, 4, 6, 1, 3, 5, 7. Other layouts (GEMV, Marlin,
ExLlama, ...) are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .columns import Columns, unpacked
from .formats import Found
from .gptqmodel_packing import cannot_pack, packed_anew
from .repack import State

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

_LAYERS = ("WQLinear_GEMM", "AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of a word stand
_NARROW = (torch.float16, torch.bfloat16)


class Awq(Columns):
    """A weight in AWQ's GEMM layout."""

    __slots__ = ("tensors", "bits", "in_half", "shape", "device", "format")

    def __init__(self, tensors: tuple[Tensor, ...], bits: int, in_half: bool) -> None:
        self.tensors, self.bits = tensors, bits
        self.in_half = in_half  # products in float16, whatever x is
        self.shape = (tensors[2].shape[1], tensors[0].shape[0])
        self.device, self.format = tensors[0].device, f"{bits} bit (AWQ)"

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype in _NARROW and not self.in_half else torch.float16

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import awq

        qweight, qzeros, scales = self.tensors
        N, K = self.shape
        if self.bits != 4 or qweight.dtype != torch.int32 or qweight.shape[1] * 8 != N:
            return f"{self.bits} bit in {qweight.dtype}; 4 in int32 and whole words are read"
        scales = scales.to(self.compute_dtype(dtype))
        return awq(qweight, qzeros, scales, K // scales.shape[0])

    def columns(self, dtype: torch.dtype) -> Tensor:
        qweight, _, scales = self.tensors
        N, K = self.shape
        size = K // scales.shape[0]
        codes = self._codes(qweight)[:, :N].unflatten(0, (-1, size))
        zeros = self.zeros().unsqueeze(1)
        scales = scales.to(self.compute_dtype(dtype)).unsqueeze(1)
        dense: Tensor = (codes - zeros) * scales
        return dense.flatten(0, 1).to(dtype)

    def zeros(self) -> Tensor:
        """The zero points [groups, N], int32."""
        return self._codes(self.tensors[1])[:, : self.shape[0]]

    def _codes(self, words: Tensor) -> Tensor:
        codes = unpacked(words, self.bits, 1)
        return codes.unflatten(1, (-1, 8))[:, :, _PLACES].flatten(1) if self.bits == 4 else codes


def read(module: Any) -> Found | str:
    """The weight of an AWQ layer, or the reason that it cannot be read."""
    kind = type(module).__name__
    if kind not in _LAYERS:
        return f"a {kind} packs its weight in another layout than AWQ's GEMM"
    bits = getattr(module, "w_bit", None) or module.bits
    if bits not in (2, 4, 8):
        return f"its weight has {bits} bit; 2, 4 and 8 are read"
    if getattr(module, "adapter", None):
        return f"a {kind} with `adapter` computes more than a product"
    held: tuple[Any, ...] = tuple(getattr(module, n, None) for n in ("qweight", "qzeros", "scales"))
    if any(t is None for t in held):
        return "its weight or its statistics are missing"
    if any(t.is_meta for t in held):
        return "its weight is on the meta device (offloaded or not loaded yet)"
    qweight, qzeros, scales = held
    groups, N = scales.shape
    whole = qweight.shape[0] == groups * module.group_size
    if not whole or qzeros.shape[0] != groups or qweight.shape[1] * 32 < N * bits:
        shapes = ", ".join(str(tuple(t.shape)) for t in held)
        return f"its weight does not fit its statistics: {shapes}, groups of {module.group_size}"
    return Found(Awq(held, bits, kind == "WQLinear_GEMM"), module.bias)


def cannot_repack(module: Any) -> str | None:
    """The reason that the layer's owner cannot pack another weight into it, or None."""
    reason = cannot_pack(module)
    if reason is None and type(module).__name__ != "AwqTorchLinear" and module.bits != 4:
        return f"a {type(module).__name__} packs 4 bit alone, and has {module.bits}"
    return reason


def repacked(module: Any, weight: Tensor) -> State:
    """What a layer of gptqmodel holds for another weight [N, K]: see :mod:`.gptqmodel_packing`."""
    held: Any = read(module)
    packed: Awq = held.packed
    K, scales = packed.shape[1], packed.tensors[2]
    groups = torch.arange(K) // (K // scales.shape[0])
    return State(dict(packed_anew(module, weight, groups, scales, packed.zeros())))
