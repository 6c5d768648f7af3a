"""Quantised weights of every format that kernels read, of any shape and of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import quantised_formats as formats
from peftkern.kernels.quantised import Quantised


def _g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=_g(seed))


def words_of(*shape: int, seed: int = 0) -> Tensor:
    return bytes_of(*shape, 4, seed=seed).view(torch.int32)[..., 0]


def scales_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.rand(*shape, generator=_g(seed)) * 0.1 + 0.01).to(dtype)


def e4m3_of(*shape: int, seed: int = 0, low: float = 0.0) -> Tensor:
    numbers = torch.randn(*shape, generator=_g(seed)) * 100
    return (numbers.abs() + low if low else numbers).to(torch.float8_e4m3fn)


def nf4(N: int, K: int, blocksize: int = 64, nested: bool = False) -> Quantised:
    blocks = -(-N * K // blocksize)
    code = torch.linspace(-1, 1, 16) ** 3
    if not nested:
        absmax = scales_of(blocks)
        return formats.bnb4(bytes_of(N * K // 2, 1), code, absmax, (N, K), blocksize)
    inner = scales_of(-(-blocks // 256)), torch.linspace(-1, 1, 256), torch.tensor(0.03), 256
    absmax = bytes_of(blocks, seed=3)
    return formats.bnb4(bytes_of(N * K // 2, 1), code, absmax, (N, K), blocksize, inner)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def int8(N: int, K: int) -> Quantised:
    bits = bytes_of(N, K).view(torch.int8)
    return formats.scaled(bits, scales_of(N, 1), (1, 0), factor=1 / 127)


def fp8(N: int, K: int, block: tuple[int, int]) -> Quantised:
    shape = [_up(n, b) if b else 1 for n, b in zip((N, K), block, strict=True)]
    return formats.scaled(e4m3_of(N, K), scales_of(*shape), block)


def gptq(N: int, K: int, group: int, act_order: bool = False) -> Quantised:
    G, half = _up(K, group), torch.float16
    order = (torch.randperm(K, generator=_g(5)) // group).int() if act_order else None
    words = words_of(K // 8, N), words_of(G, N // 8, seed=4)
    return formats.gptq(*words, scales_of(G, N, dtype=half), group, order)


def awq(N: int, K: int, group: int) -> Quantised:
    G = _up(K, group)
    words = words_of(K, N // 8), words_of(G, N // 8, seed=4)
    return formats.awq(*words, scales_of(G, N, dtype=torch.float16), group)


def packed_rows(N: int, K: int, group: int, zeros: bool = False) -> Quantised:
    G = _up(K, group) if group else 1
    z = words_of(N // 8, G, seed=4) if zeros else None
    scales = scales_of(N, G, dtype=torch.bfloat16)
    return formats.packed_rows(words_of(N, K // 8), scales, group, z)


def mxfp4(N: int, K: int) -> Quantised:
    return formats.mxfp4(bytes_of(N, K // 2), bytes_of(N, _up(K, 32), seed=2) // 8 + 100)


def nvfp4(N: int, K: int, how: str = "over") -> Quantised:
    scales, every = (
        e4m3_of(N, _up(K, 16), seed=2, low=1.0),
        torch.tensor([37.0 if how == "over" else 0.37]),
    )
    return formats.nvfp4(bytes_of(N, K // 2), scales, every, how)


# {name: a function of N and K, multiples of 8}
CASES: dict[str, Any] = {
    "nf4": nf4,
    "nf4, nested": lambda N, K: nf4(N, K, 64, True),
    "nf4, blocks of 16, nested": lambda N, K: nf4(N, K, 16, True),
    "nf4, blocks of 256": lambda N, K: nf4(N, K, 256),
    "int8": int8,
    "fp8 in one": lambda N, K: fp8(N, K, (0, 0)),
    "fp8 by row": lambda N, K: fp8(N, K, (1, 0)),
    "fp8 by block": lambda N, K: fp8(N, K, (128, 128)),
    "fp8 by small block": lambda N, K: fp8(N, K, (24, 16)),
    "fp8 by odd block": lambda N, K: fp8(N, K, (1, 40)),
    "gptq": lambda N, K: gptq(N, K, 32),
    "gptq, act-order": lambda N, K: gptq(N, K, 32, True),
    "awq": lambda N, K: awq(N, K, 32),
    "packed rows": lambda N, K: packed_rows(N, K, 32),
    "packed rows, zeros": lambda N, K: packed_rows(N, K, 64, True),
    "packed rows, a scale for each": lambda N, K: packed_rows(N, K, 0),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "nvfp4, times": lambda N, K: nvfp4(N, K, "times"),
}
