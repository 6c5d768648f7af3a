"""The kernel that dequantises, bit for bit: the formula beside it, and each format's owner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import dequantise as module
from peftkern.kernels import quantised_formats as formats
from peftkern.kernels import quantised_tile
from peftkern.kernels.common import Arch
from peftkern.kernels.dequantise import DequantiseConfig, dequantise
from peftkern.kernels.quantised import checked, dense, why_not
from tests.kernels import quantised_cases as cases
from tests.kernels.oracle import DTYPES, few
from tests.kernels.quantised_cases import CASES


def check(w: Any, dtype: torch.dtype, config: DequantiseConfig | None = None) -> None:
    out = dequantise(w, dtype, config=config)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, dense(w, dtype))
    exact = dense(w)  # at most four roundings in a row, and one to the owner's dtype
    rounding = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    if w.layout.through:
        rounding += torch.finfo(getattr(torch, w.layout.through)).eps
    small = torch.finfo(dtype).smallest_normal
    # statistics that cancel (nested) are exact to their own size
    size = exact.abs() + (0 if w.offset is None else 2.0)
    assert ((out.double() - exact).abs() <= rounding * size + small).all()


@pytest.mark.parametrize("name", CASES)
def test_every_format_bit_for_bit(name: str) -> None:
    for N, K in ((40, 136), (8, 24)):
        for dtype in DTYPES:
            check(CASES[name](N, K), dtype)


@few
@given(
    name=st.sampled_from(sorted(CASES)),
    N=st.integers(1, 9),
    K=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([(8, 32), (16, 64), (32, 16)]),
)
def test_any_shape_and_tile(
    name: str, N: int, K: int, dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    check(CASES[name](8 * N, 8 * K), dtype, DequantiseConfig(*tile))


@pytest.mark.parametrize("N, K", [(1, 2), (7, 130), (33, 96), (5, 34)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_run_on_from_row_to_row(N: int, K: int, nested: bool) -> None:
    w = cases.nf4(N, K, 64, nested)
    assert w.layout.flat
    for dtype in DTYPES:
        check(w, dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("N, K, blocksize", [(48, 128, 64), (20, 256, 128), (9, 512, 512)])
def test_4_bits_of_bitsandbytes(kind: str, nested: bool, N: int, K: int, blocksize: int) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    numbers = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    bits, state = functional.quantize_4bit(
        numbers, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    inner = None
    if nested:
        inner = state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize
    w = formats.bnb4(bits, state.code, state.absmax, (N, K), blocksize, inner)
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(dequantise(w, dtype), functional.dequantize_4bit(bits, state))


def test_int8_of_bitsandbytes() -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    numbers = torch.randn(24, 56, generator=torch.Generator().manual_seed(0))
    bits, statistics, _ = functional.int8_vectorwise_quant(numbers.half())
    w = formats.scaled(bits, statistics[:, None], (1, 0), factor=7.874015718698502e-3)
    assert torch.equal(
        dequantise(w, torch.float32), functional.int8_vectorwise_dequant(bits, statistics)
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_rows_of_compressed_tensors(symmetric: bool) -> None:
    pack: Any = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (16, 64), generator=g).to(torch.int8)
    z = torch.zeros(16, 2, dtype=torch.int8)
    zeros = None
    if not symmetric:
        z = torch.randint(-8, 8, (16, 2), generator=g).to(torch.int8)
        zeros = pack.pack_to_int32(z, 4, packed_dim=0).contiguous()
    scales = cases.scales_of(16, 2, dtype=torch.bfloat16)
    w = formats.packed_rows(pack.pack_to_int32(q, 4), scales, 32, zeros)
    each = [t.repeat_interleave(32, 1) for t in (z, scales)]
    owner = (q.to(scales.dtype) - each[0].to(scales.dtype)) * each[1]
    assert torch.equal(dequantise(w, torch.bfloat16), owner)


def test_gptq_and_awq_as_their_papers_code_packs_them() -> None:
    g = torch.Generator().manual_seed(0)
    N, K, group = 24, 64, 32
    q, z = torch.randint(0, 16, (K, N), generator=g), torch.randint(0, 16, (2, N), generator=g)
    scales = cases.scales_of(2, N, dtype=torch.float16)
    order = (torch.randperm(K, generator=g) // group).int()

    def packed(t: torch.Tensor, places: list[int]) -> torch.Tensor:
        """Eight neighbours of the last axis in a word, the i-th at 4 bits times places[i]."""
        eight = t.unflatten(-1, (-1, 8)) << (4 * torch.tensor(places))
        return eight.sum(-1).to(torch.uint32).view(torch.int32)

    plain = list(range(8))
    words = packed(q.t().contiguous(), plain).t().contiguous()
    for groups in (None, order):
        at = torch.arange(K) // group if groups is None else groups.long()
        owner = scales[at] * (q - z[at]).half()
        w = formats.gptq(words, packed((z - 1) & 15, plain), scales, group, groups)
        assert torch.equal(dequantise(w, torch.float16), owner.t())
    interleaved = [0, 4, 1, 5, 2, 6, 3, 7]
    w = formats.awq(packed(q, interleaved), packed(z, interleaved), scales, group)
    at = torch.arange(K) // group
    assert torch.equal(dequantise(w, torch.float16), (scales[at] * (q - z[at]).half()).t())


def test_mxfp4_of_transformers() -> None:
    mxfp4: Any = pytest.importorskip("transformers.integrations.mxfp4")
    bits = cases.bytes_of(1, 16, 3, 16)
    scales = cases.bytes_of(1, 16, 3, seed=2) // 4 + 90
    owner = mxfp4._convert_moe_packed_tensors(bits, scales)  # [experts, K, N]
    w = formats.mxfp4(bits[0].flatten(1), scales[0])
    assert torch.equal(dequantise(w, torch.bfloat16), owner[0].t())


@pytest.mark.parametrize("capability", [80, 90])
def test_every_byte_of_fp8(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "arch_of", lambda device: Arch(4, capability, 166912))
    bits = torch.arange(256, dtype=torch.uint8).view(16, 16)
    wanted = bits.view(torch.float8_e4m3fn).float()
    w = formats.scaled(bits.view(torch.float8_e4m3fn), torch.ones(1, 1), (0, 0))
    native = quantised_tile.operands(w, Arch(4, capability, 166912))[0].dtype != torch.uint8
    assert native == (capability >= 89)
    out = dequantise(w, torch.float32)
    if native:  # Triton's interpreter knows no NaN there
        out, wanted = out[~wanted.isnan()], wanted[~wanted.isnan()]
    assert torch.equal(out.nan_to_num(7e9), wanted.nan_to_num(7e9))


def test_refused() -> None:
    w = cases.nf4(8, 64)
    assert why_not(w) is None
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        dequantise(w, torch.float64)
    with pytest.raises(TypeError, match="w is a Tensor"):
        dequantise(torch.ones(3, 3), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w.scales has shape \(4, 1\); allowed: \(8, 1\)"):
        checked("w", w._replace(scales=w.scales[:4]))
    with pytest.raises(ValueError, match="w.code is missing"):
        checked("w", w._replace(code=None))
    with pytest.raises(ValueError, match="w.inner_code is missing"):
        checked("w", cases.nf4(8, 64, 64, True)._replace(inner_code=None))
    with pytest.raises(ValueError, match="layout.order is 'up'"):
        checked("w", w._replace(layout=w.layout._replace(order="up")))
    with pytest.raises(TypeError, match="w.bits has dtype torch.float32"):
        checked("w", w._replace(bits=torch.ones(8, 32)))
    with pytest.raises(ValueError, match="no multiple of 2, and words run on"):
        checked("w", w._replace(shape=(8, 65)))
    foreign = cases.fp8(8, 16, (0, 0))
    foreign = foreign._replace(bits=foreign.bits.float().to(torch.float8_e4m3fnuz))
    assert why_not(foreign) == "fp8 of AMD's kind (e4m3fnuz)"
    with pytest.raises(ValueError, match="fnuz"):
        dequantise(foreign, torch.float32)
    assert dequantise(cases.int8(0, 8), torch.float32).shape == (0, 8)
