"""Quantised weights of each format, without data or of random numbers, for entries of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import quantised_formats as formats
from peftkern.kernels.quantised import Quantised

from .traffic import Facts, nbytes

Make = Callable[..., Tensor]  # (*shape, dtype=...) -> a tensor


def nf4(make: Make, N: int, K: int, nested: bool = True) -> Quantised:
    """As bitsandbytes packs it, in blocks of 64."""
    blocks = -(-N * K // 64)
    code = make(16, dtype=torch.float32)
    absmax = make(blocks, dtype=torch.uint8 if nested else torch.float32)
    inner: Any = None
    if nested:
        single = [make(n, dtype=torch.float32) for n in (-(-blocks // 256), 256, 1)]
        inner = (*single, 256)
    bits = make(N * K // 2, 1, dtype=torch.uint8)
    return formats.bnb4(bits, code, absmax, (N, K), 64, inner)


def int8(make: Make, N: int, K: int) -> Quantised:
    scales = make(N, 1, dtype=torch.float32)
    return formats.scaled(make(N, K, dtype=torch.int8), scales, (1, 0), 1 / 127)


def fp8(make: Make, N: int, K: int) -> Quantised:
    """In blocks of 128 x 128."""
    bits = make(N, K, dtype=torch.float8_e4m3fn)
    scales = make(-(-N // 128), -(-K // 128), dtype=torch.float32)
    return formats.scaled(bits, scales, (128, 128))


def int4(make: Make, N: int, K: int) -> Quantised:
    """Rows of words in groups of 128, as compressed-tensors packs them."""
    scales = make(N, -(-K // 128), dtype=torch.bfloat16)
    return formats.packed_rows(make(N, K // 8, dtype=torch.int32), scales, 128)


def gptq(make: Make, N: int, K: int, ordered: bool = False) -> Quantised:
    G = -(-K // 128)
    words, zeros = make(K // 8, N, dtype=torch.int32), make(G, N // 8, dtype=torch.int32)
    groups = make(K, dtype=torch.int32) if ordered else None
    if groups is not None and not groups.is_meta:
        groups.copy_(torch.arange(K, device=groups.device) % G)
    return formats.gptq(words, zeros, make(G, N, dtype=torch.float16), 128, groups)


def awq(make: Make, N: int, K: int) -> Quantised:
    G = -(-K // 128)
    words, zeros = make(K, N // 8, dtype=torch.int32), make(G, N // 8, dtype=torch.int32)
    return formats.awq(words, zeros, make(G, N, dtype=torch.float16), 128)


def mxfp4(make: Make, N: int, K: int) -> Quantised:
    bits, exponents = make(N, K // 2, dtype=torch.uint8), make(N, -(-K // 32), dtype=torch.uint8)
    return formats.mxfp4(bits, exponents)


def nvfp4(make: Make, N: int, K: int) -> Quantised:
    bits, scales = (make(N, K // n, dtype=d) for n, d in ((2, torch.uint8), (16, _E4M3)))
    return formats.nvfp4(bits, scales, make(1, dtype=torch.float32))


_E4M3 = torch.float8_e4m3fn


FORMATS: dict[str, Callable[..., Quantised]] = {
    "nf4": lambda make, N, K: nf4(make, N, K, False),
    "nf4 nested": nf4,
    "int8": int8,
    "fp8": fp8,
    "int4": int4,
    "gptq": gptq,
    "gptq act-order": lambda make, N, K: gptq(make, N, K, True),
    "awq": awq,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}


def drawn(device: str) -> Make:
    """Makes tensors of random bytes, or of positive numbers below 1 in floats of two bytes up."""

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point and dtype.itemsize > 1:
            return torch.rand(shape, device=device).to(dtype)
        wide = (*shape[:-1], shape[-1] * dtype.itemsize)
        # in e4m3 no byte up to 126 is a NaN
        high = 127 if dtype == _E4M3 else 256
        data = torch.randint(0, high, wide, dtype=torch.uint8, device=device)
        return data.view(dtype)

    return make


# the arguments of a kernel that hold a weight
_OPERANDS = (
    "bits", "scales", "code", "zeros", "groups", "overall", "inner_scales", "inner_code", "offset",
)  # fmt: skip


def packed_bytes(f: Facts) -> int:
    """Bytes of the packed weight in a launch's arguments, of which each is a tensor or a tuple."""
    given = [f[name] for name in _OPERANDS]
    return sum(sum(map(nbytes, t)) if isinstance(t, tuple) else nbytes(t) for t in given)
