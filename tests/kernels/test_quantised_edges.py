"""Odd numbers, shapes and rows of quantised weights: the kernels against each owner's reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.kernels import dequantise as module
from peftkern.kernels.common import Arch
from peftkern.kernels.dequantise import dequantise
from peftkern.ops import quantised_triton, triton_backend
from peftkern.ops.bases.awq import Awq
from peftkern.ops.bases.compressed_numbers import PackedFloat4, PackedInt
from peftkern.ops.bases.formats import read
from peftkern.ops.bases.fp8 import Fp8
from peftkern.ops.bases.gptq import Gptq
from peftkern.ops.bases.int8 import Int8
from peftkern.ops.bases.mx import Mx4
from peftkern.ops.bases.weight import BaseWeight, Packed
from peftkern.ops.projection import Projection
from tests import packed_layers
from tests.closeness import assert_as_good_as_torch
from tests.kernels.oracle import DTYPES, blas, matrix
from tests.kernels.quantised_cases import bytes_of, e4m3_of, scales_of, words_of
from tests.quantised_models import bnb4

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def check(packed: Packed, dtypes: Any = DTYPES) -> None:
    """The kernel's numbers are the owner's, bit for bit; NaN stands where NaN does."""
    for dtype in dtypes:
        found = quantised_triton.readable(packed, dtype)
        assert not isinstance(found, str), found
        ours, wanted = dequantise(found, dtype), packed.dense(dtype)
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.masked_fill(ours.isnan(), 0), wanted.masked_fill(wanted.isnan(), 0))


def gptq_of(stored: Tensor, first: bool, wraps: bool, K: int = 32) -> Gptq:
    """Stored zeros [G, N] under random codes."""
    G, N = stored.shape
    words, scales = words_of(K // 8, N), scales_of(G, N, dtype=HALF)
    groups = torch.arange(K).int() // (K // G)
    held = words, packed_layers.packed(stored, 4), scales, groups
    return Gptq(held, 4, K, N, first, K // G, wraps)


@pytest.mark.parametrize("first, wraps", [(True, True), (True, False), (False, True)])
def test_every_stored_zero_of_gptq(first: bool, wraps: bool) -> None:
    stored = torch.arange(16).view(1, 16)
    packed = gptq_of(stored, first, wraps)
    check(packed)
    codes = (packed.tensors[0][:1] & 15).double()  # of the first input
    zeros = stored.double() + first
    zeros = zeros % 16 if wraps else zeros
    wanted = packed.tensors[2][0].double() * (codes[0] - zeros[0])
    assert torch.equal(packed.dense(HALF)[:, 0], wanted.half())


def test_a_stored_zero_of_fifteen_is_what_its_owner_takes_it_for() -> None:
    kinds = ((packed_layers.Gptq, 16), (packed_layers.GptqOld, 0), (packed_layers.GptqModel, 0))
    for kind, zero in kinds:
        layer = kind(nn.Linear(32, 8, bias=False))
        for t, value in ((layer.qweight, 0), (layer.qzeros, -1), (layer.scales, 1)):
            t.fill_(value)
        found = read(layer)
        assert not isinstance(found, str)
        assert torch.equal(found.packed.dense(FP32), torch.full((8, 32), -float(zero)))
        check(found.packed, [HALF])


# NumPy's, in the interpreter: the largest powers times six are infinite, or NaN's
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_every_power_of_mxfp4_and_its_nan() -> None:
    bits = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every code, [16, 32]
    powers = torch.tensor([0, 1, 2, 103, 104, 126, 127, 128, 141, 142, 252, 253, 254, 255, 0, 255])
    scale = powers.to(torch.uint8)[:, None]
    check(Mx4(bits, scale), [FP32])
    # the interpreter has no subnormal numbers of bf16
    large = scale.clamp(min=3)
    check(Mx4(bits, large))
    check(PackedFloat4(bits, large, None, 32, ""))
    nan = Mx4(bits, scale).dense(FP32).isnan()
    assert torch.equal(nan, (powers == 255)[:, None].expand_as(nan))


@pytest.mark.parametrize("number", [0.0, 0.001953125, 448.0, float("nan")])
def test_scales_of_nvfp4(number: float) -> None:
    scale = torch.full((16, 2), number).to(torch.float8_e4m3fn)
    bits = torch.arange(256, dtype=torch.uint8).view(16, 16)
    check(PackedFloat4(bits, scale, torch.tensor([3.7]), 16, ""))


def test_the_nan_of_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    # as bytes: Triton's interpreter knows no NaN where the instruction converts
    monkeypatch.setattr(module, "arch_of", lambda device: Arch(4, 80, 166912))
    q = torch.arange(256, dtype=torch.uint8).view(4, 64).view(torch.float8_e4m3fn)
    for scale, block in ((scales_of(1), None), (scales_of(4, 1), None), (scales_of(2, 2), (2, 32))):
        check(Fp8(q, scale, block, "fp8"))


def nf4(N: int, K: int) -> Packed:
    pytest.importorskip("bitsandbytes")
    found = read(bnb4(nn.Linear(K, N), quant_type="nf4", compress_statistics=True))
    assert not isinstance(found, str)
    return found.packed


def awq(N: int, K: int, G: int) -> Packed:
    return Awq(
        (words_of(K, N // 8), words_of(G, N // 8, seed=1), scales_of(G, N, dtype=HALF)), 4, False
    )


SHAPES: dict[str, Any] = {
    "nf4, one output": lambda: nf4(1, 64),
    "nf4, blocks run on": lambda: nf4(3, 34),
    "int8, one output": lambda: Int8(bytes_of(1, 40).view(torch.int8), scales_of(1), ""),
    "fp8, one output": lambda: Fp8(e4m3_of(1, 40), scales_of(1, 1), None, ""),
    "fp8, one output in blocks": lambda: Fp8(e4m3_of(1, 200), scales_of(1, 2), (128, 128), ""),
    "fp8, blocks that do not divide": lambda: Fp8(
        e4m3_of(130, 136), scales_of(2, 2), (128, 128), ""
    ),
    "fp8, odd groups": lambda: Fp8(e4m3_of(5, 50), scales_of(5, 3), (1, 24), ""),
    "int4, one output": lambda: PackedInt(
        words_of(1, 8), 4, (1, 64), scales_of(1, 2, dtype=BF16), None, (1, 32), ""
    ),
    "int4, groups of 24": lambda: PackedInt(
        words_of(3, 9), 4, (3, 72), scales_of(3, 3, dtype=BF16), None, (1, 24), ""
    ),
    "int4, a scale a row": lambda: PackedInt(
        words_of(3, 9), 4, (3, 72), scales_of(3, 1, dtype=BF16), None, None, ""
    ),
    "gptq, one group": lambda: gptq_of(torch.arange(8).view(1, 8), True, False, 8),
    "gptq, groups of 24": lambda: gptq_of(torch.arange(24).view(3, 8) % 16, True, True, 72),
    "awq, one group": lambda: awq(8, 7, 1),
    "awq, groups of 24": lambda: awq(16, 72, 3),
    "mxfp4, one output": lambda: Mx4(bytes_of(1, 48), bytes_of(1, 3) // 8 + 100),
}


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_and_rows(name: str) -> None:
    """Bit for bit, and products of no row, one, and a few with what a call makes of them."""
    packed = SHAPES[name]()
    check(packed)
    (N, K), dtype = packed.shape, HALF
    w, numbers = BaseWeight(packed, dtype), packed.dense(dtype)
    a, b = matrix(2, K, FP32, seed=1), matrix(N, 2, FP32, seed=2)
    for rows in (0, 1, 3):
        x = matrix(rows, K, dtype, seed=3)
        member = Projection(w, None, a, b, 0.5, 0.0, False)
        (y,) = triton_backend.infer_group(x, [member])
        assert y.shape == (rows, N) and quantised_triton.infer(x, [member]) is not None
        made = quantised_triton.base_product(x, w.t())
        assert made.shape == (rows, N)
        if rows:
            exact = x.double() @ numbers.double().T
            low = 0.5 * (x.double() @ a.double().T) @ b.double().T
            plain = blas(x, numbers.T)
            assert_as_good_as_torch(made, plain.to(dtype), exact)
            s = (blas(x, a.to(dtype).T) * 0.5).to(dtype)
            assert_as_good_as_torch(y, (plain + blas(s, b.to(dtype).T)).to(dtype), exact + low)
