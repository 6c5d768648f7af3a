"""GPTQ (Frantar et al., 2022, arXiv 2210.17323) as gptqmodel and auto-gptq pack it.

    W[n, k] = scales[g, n] · (codes[k, n] - zeros[g, n]),  g = g_idx[k]

``qweight`` [K · bits / 32, N] packs codes along K, ``qzeros`` [groups, N · bits / 32] along N.
``g_idx`` [K] is the group of each input, in any order when the inputs were quantised in the order
of their activations (act-order). Version 1 of the format stores zeros less 1. The largest code plus
1 is 2^bits (16) where auto-gptq dequantises, and 0 in its layer "cuda-old" and in gptqmodel. Layers
for one kernel (Marlin, ExLlama, ...) pack the weight anew, each in its own way, and are not read.
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

# the layers that keep the format's own layout
_MODEL = ("TorchLinear", "TritonV2Linear")
_AUTO = ("cuda", "cuda-old", "triton", "tritonv2")
_BITS = (2, 3, 4, 8)


class Gptq(Columns):
    """A weight in GPTQ's layout."""

    __slots__ = ("tensors", "bits", "first", "wraps", "group", "shape", "device", "format")

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        bits: int,
        K: int,
        N: int,
        first: bool,
        group: int = 0,
        wraps: bool = True,
    ) -> None:
        self.tensors, self.bits, self.shape = tensors, bits, (N, K)
        self.first, self.wraps = first, wraps  # version 1, and whether its zeros keep their bits
        self.group = group  # the inputs of each group, if they are known to be in order
        self.device, self.format = tensors[0].device, f"{bits} bit (GPTQ)"

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import gptq

        qweight, qzeros, scales, groups = self.tensors
        N, K = self.shape
        words = (qweight.dtype, qzeros.dtype, *qweight.shape, qzeros.shape[1])
        if self.bits != 4 or words != (torch.int32, torch.int32, K // 8, N, N // 8):
            return f"{self.bits} bit in {qweight.dtype}; 4 in int32 and whole words are read"
        # without a word of the layer only the device's memory tells whether groups are in order
        order = None if self.group else groups.int()
        return gptq(qweight, qzeros, scales, self.group, order, int(self.first), self.wraps)

    def zeros(self) -> Tensor:
        """The zero points [groups, N] that are subtracted from codes, int32."""
        zeros = unpacked(self.tensors[1], self.bits, 1)[:, : self.shape[0]]
        if self.first:
            zeros = zeros + 1
            zeros = zeros & 2**self.bits - 1 if self.wraps else zeros
        return zeros

    def columns(self, dtype: torch.dtype) -> Tensor:
        qweight, _, scales, groups = self.tensors
        zeros = self.zeros()
        K = self.shape[1]
        codes = unpacked(qweight, self.bits, 0)[:K]
        return (scales[groups] * (codes - zeros[groups])).to(dtype)


def read(module: Any) -> Found | str:
    """The weight of a GPTQ layer, or the reason that it cannot be read."""
    names = {c.__name__ for c in type(module).__mro__}
    kind, way = type(module).__name__, getattr(module, "QUANT_TYPE", None)
    if "BaseQuantLinear" in names:
        if kind not in _MODEL:
            return f"a {kind} packs its weight anew, or computes in its own way"
        first, wraps = module.qzero_format() == 1, True
    else:
        if way not in _AUTO:
            return f"a {kind} of kind {way!r} packs its weight anew"
        first, wraps = True, way == "cuda-old" and module.bits != 3
    for name in ("adapter", "online_full_had", "online_partial_had"):
        if getattr(module, name, None):
            return f"a {kind} with `{name}` computes more than a product"
    if module.bits not in _BITS or getattr(module, "planar", False):
        return f"its {module.bits} bit weight is packed in planes, which are not read"
    held: tuple[Any, ...] = tuple(
        getattr(module, n, None) for n in ("qweight", "qzeros", "scales", "g_idx")
    )
    if any(t is None for t in held):
        return "its weight or its statistics are missing"
    if any(t.is_meta for t in held):
        return "its weight is on the meta device (offloaded or not loaded yet)"
    qweight, qzeros, scales, groups = held
    K, N = groups.numel(), scales.shape[1]
    width = 8 * qweight.element_size()
    wrong = qweight.shape[0] * width < K * module.bits or qzeros.shape[1] * width < N * module.bits
    if wrong or qweight.shape[1] != N or qzeros.shape[0] != scales.shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in held)
        return f"its weight does not fit its statistics: {shapes} at {module.bits} bit"
    size = module.group_size if getattr(module, "desc_act", True) is False else 0
    group = K if size == -1 else size
    if group and -(-K // group) != scales.shape[0]:
        group = 0
    return Found(Gptq(held, module.bits, K, N, first, group, wraps), module.bias)


cannot_repack = cannot_pack


def repacked(module: Any, weight: Tensor) -> State:
    """What a layer of gptqmodel holds for another weight [N, K]: see :mod:`.gptqmodel_packing`."""
    held: Any = read(module)
    packed: Gptq = held.packed
    scales, groups = packed.tensors[2], packed.tensors[3]
    made = packed_anew(module, weight, groups.long(), scales, packed.zeros(), packed.first)
    return State(dict(made))
