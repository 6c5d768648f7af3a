"""Layers of GPTQ and AWQ by their published layouts, for machines without their libraries.

Packing and forward are written out one code at a time from the formats' descriptions, so that they
share no code with what is tested. They stand under the libraries' names, by which layers are found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def packed(codes: Tensor, bits: int) -> Tensor:
    """int32 words [R, C · bits / 32] of codes [R, C]: one stream of bits a row, the low ones first.

    Every word is filled, so that codes of 3 bits cross from one word into the next.
    """
    rows = []
    for row in codes.tolist():
        stream = sum(int(code) << bits * i for i, code in enumerate(row))
        words = [(stream >> 32 * w) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32)


class GptqLayer(nn.Module):
    """GPTQ's layout with random codes; ``dense`` [N, K] is the weight, float16 as its scales."""

    QUANT_TYPE = "cuda"
    GROWS = False  # True: in version 1 the largest code plus 1 is one more than it, not 0

    def __init__(
        self, linear: nn.Linear, bits: int = 4, size: int = 32, order: bool = False, first: int = 1
    ) -> None:
        super().__init__()
        N, K = linear.weight.shape
        self.bits, self.infeatures, self.outfeatures = bits, K, N
        groups = torch.arange(K) // size
        if order:
            groups = groups[torch.randperm(K)]
        count, top = K // size, 2**bits - 1
        codes = torch.randint(0, top + 1, (K, N))
        zeros = torch.randint(0, top + 1, (count, N))
        scales = (torch.rand(count, N) * 0.1 / top).half()
        stored = (zeros - 1) % (top + 1) if first else zeros
        if first and self.GROWS:
            zeros = stored + 1
        self.register_buffer("qweight", packed(codes.T, bits).T.contiguous())
        self.register_buffer("qzeros", packed(stored, bits))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", groups.int())
        self.bias = None if linear.bias is None else linear.bias.detach().half()
        self.first = first
        numbers = [scales[g] * (codes[k] - zeros[g]) for k, g in enumerate(groups)]
        self.register_buffer("dense", torch.stack(numbers).T.contiguous(), persistent=False)

    def qzero_format(self) -> int:
        return 1 if self.first else 2

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dense.to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(x.dtype)


class AwqLayer(nn.Module):
    """AWQ's GEMM layout with random codes; products in float16, as autoawq's."""

    def __init__(self, linear: nn.Linear, size: int = 32) -> None:
        super().__init__()
        N, K = linear.weight.shape
        self.in_features, self.out_features, self.w_bit, self.group_size = K, N, 4, size
        codes, zeros = torch.randint(0, 16, (K, N)), torch.randint(0, 16, (K // size, N))
        scales = (torch.rand(K // size, N) * 0.01).half()
        order = [8 * word + i for word in range(N // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        self.register_buffer("qweight", packed(codes[:, order], 4))
        self.register_buffer("qzeros", packed(zeros[:, order], 4))
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else linear.bias.detach().half()
        numbers = [(codes[k] - zeros[k // size]) * scales[k // size] for k in range(K)]
        self.register_buffer("dense", torch.stack(numbers).T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.half() @ self.dense.T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def under(kind: type, name: str, *parents: str, library: str) -> Any:
    """The class under a library's name, with empty classes of that library above it."""
    module = f"{library}.layers"
    above = tuple(type(parent, (nn.Module,), {"__module__": module}) for parent in parents)
    return type(name, (kind, *above), {"__module__": module})


Gptq = under(GptqLayer, "QuantLinear", library="auto_gptq")
Gptq.GROWS = True
GptqOld = under(GptqLayer, "QuantLinear", library="auto_gptq")
GptqOld.QUANT_TYPE = "cuda-old"
GptqModel = under(GptqLayer, "TorchLinear", "BaseQuantLinear", library="gptqmodel")
Awq = under(AwqLayer, "WQLinear_GEMM", library="awq")
