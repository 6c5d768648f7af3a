"""Records of quantised weights, made from the tensors that their owners keep; nothing is copied.

A format that packs its numbers in an order of its own (tiles for one kernel) has none here: its
owner dequantises it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import cdiv
from .quantised import Layout, Quantised


def bnb4(
    bits: Tensor,
    code: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Quantised:
    """NF4 or FP4 as bitsandbytes packs them, of which blocks run on from row to row.

    ``bits`` holds N K / 2 bytes in any storage dtype; ``nested`` has (absmax, code, offset,
    blocksize) of quantised statistics. K must be even.
    """
    N, K = shape
    inner_scales, inner_code, offset, inner = nested or (None, None, None, 256)
    whole = K % blocksize == 0
    layout = Layout(
        "code", 2, "k", "high", 1, blocksize, not whole, "nested" if nested else "float",
        inner=inner,
    )  # fmt: skip
    words = bits.reshape(-1).view(torch.uint8)[: N * K // 2].view(N, K // 2)
    blocks = N * cdiv(K, blocksize) if whole else cdiv(N * K, blocksize)
    scales = absmax.reshape(-1)[:blocks].view((N, -1) if whole else (1, -1))
    return Quantised(
        shape, layout, words, scales, code,
        inner_scales=inner_scales, inner_code=inner_code, offset=offset,
    )  # fmt: skip


def scaled(
    bits: Tensor,
    scales: Tensor,
    block: tuple[int, int],
    factor: float = 1.0,
    through: torch.dtype | None = None,
) -> Quantised:
    """int8 or float8_e4m3fn numbers [N, K] times the scale of their block.

    ``block`` is (rows, columns) that share one of ``scales`` [blocks of rows, blocks of columns], 0
    for all: (1, 0) is a scale for each row, (0, 0) one for all. The product is rounded to
    ``through`` first, and multiplied by ``factor`` last (1 / 127 in LLM.int8).
    """
    number = "int8" if bits.dtype == torch.int8 else "e4m3"
    layout = Layout(number, rows=block[0], columns=block[1], factor=factor, through=_name(through))
    return Quantised(_shape(bits), layout, bits, scales)


def gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    group: int,
    groups: Tensor | None = None,
    zero: int = 1,
    wraps: bool = True,
) -> Quantised:
    """int4 as GPTQ packs it: qweight int32 [K / 8, N], qzeros int32 [G, N / 8], scales [G, N].

    ``group`` columns share a scale, or ``groups`` [K] says which is whose (act-order). ``zero`` is
    added to the stored zero points: 1 in the first format, 0 in the second. ``wraps`` says what 15
    and 1 are: 0, or 16.
    """
    K, N = qweight.shape[0] * 8, qweight.shape[1]
    layout = Layout(
        "int", 8, columns=group, zero=zero, wraps=wraps, zero_per=8, through=_name(scales.dtype)
    )
    return Quantised((N, K), layout, qweight.t(), scales.t(), zeros=qzeros, groups=groups)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Quantised:
    """int4 as AWQ packs it: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]."""
    K, N = qweight.shape[0], qweight.shape[1] * 8
    layout = Layout("int", 8, "n", "awq", columns=group, zero_per=8, through=_name(scales.dtype))
    return Quantised((N, K), layout, qweight.t(), scales.t(), zeros=qzeros)


def packed_rows(
    words: Tensor, scales: Tensor, group: int, zeros: Tensor | None = None, zero: int = 8
) -> Quantised:
    """int4 in rows of int32 words [N, K / 8], scales [N, G], ``group`` columns for each; 0 for all.

    The zero point is ``zero``, or what the words ``zeros`` [N / 8, G] hold.
    """
    N, K = words.shape[0], words.shape[1] * 8
    z = (0, 8) if zeros is not None else (zero, 1)
    layout = Layout("int", 8, columns=group, zero=z[0], zero_per=z[1], through=_name(scales.dtype))
    turned = None if zeros is None else zeros.t()
    return Quantised((N, K), layout, words, scales, zeros=turned)


def mxfp4(bits: Tensor, exponents: Tensor) -> Quantised:
    """FP4 with a power of two for 32 numbers: uint8 [N, K / 2] and [N, K / 32]."""
    layout = Layout("e2m1", 2, columns=32, scale="e8m0")
    return Quantised((bits.shape[0], bits.shape[1] * 2), layout, bits, exponents)


def nvfp4(bits: Tensor, scales: Tensor, overall: Tensor, how: str = "over") -> Quantised:
    """FP4 with an e4m3 scale for 16 numbers, ``how`` ("over", "times") one fp32 number for all."""
    layout = Layout("e2m1", 2, columns=16, scale="e4m3", overall=how)
    return Quantised((bits.shape[0], bits.shape[1] * 2), layout, bits, scales, overall=overall)


def _shape(bits: Tensor) -> tuple[int, int]:
    return bits.shape[0], bits.shape[1]


def _name(dtype: torch.dtype | None) -> str:
    """A dtype that rounds, by its name; "" for none."""
    return "" if dtype in (None, torch.float32) else str(dtype).removeprefix("torch.")
