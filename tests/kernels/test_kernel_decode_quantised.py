"""Few rows on a quantised W, against float64, against torch, and against the dense weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.decode_quantised import launches
from peftkern.kernels import reference
from peftkern.kernels.common import Arch
from peftkern.kernels.decode_quantised import (
    MAX_ROWS,
    DecodeQuantisedConfig,
    decode_quantised,
    default_config,
    registers,
)
from peftkern.kernels.flight import needed
from peftkern.kernels.quantised import dense
from tests.kernels import quantised_cases as cases
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, blas, few, matrix
from tests.kernels.quantised_cases import CASES


def check(
    name: str,
    M: int,
    Ns: tuple[int, ...],
    K: int,
    r: int,
    dtype: torch.dtype,
    adapter: torch.dtype = torch.float32,
    config: DecodeQuantisedConfig | None = None,
    bias: bool = True,
) -> None:
    x = matrix(M, K, dtype, seed=0, offset=1)
    ws = [CASES[name](n, K) for n in Ns]
    As = [matrix(r + i, K, adapter, seed=1 + i, offset=2) for i in range(len(Ns))]
    Bs = [matrix(n, r + i, adapter, seed=9 + i) for i, n in enumerate(Ns)]
    biases = [matrix(1, n, dtype, seed=3)[0].contiguous() if bias else None for n in Ns]
    scales = [0.5 + i for i in range(len(Ns))]
    ys = decode_quantised(x, ws, As, Bs, scales, biases, config=config)
    for y, w, a, b, c, scale in zip(ys, ws, As, Bs, biases, scales, strict=True):
        assert y.dtype == dtype
        numbers = dense(w, dtype)  # the products are of W in X's dtype, as its owner's are
        exact = reference.linear(x, numbers, reference.shrink(x, a, scale), b)
        s = (blas(x, a.to(dtype).T) * scale).to(dtype)
        plain = blas(x, numbers.T) + blas(s, b.to(dtype).T)
        if c is not None:
            exact, plain = exact + c.double(), plain + c.float()
        assert_as_good_as_torch(y, plain.to(dtype), exact)
    again = decode_quantised(x, ws, As, Bs, scales, biases, config=config)
    assert all(map(torch.equal, ys, again)), "two runs differ"


def test_a_group_whose_scales_lie_unlike() -> None:
    """Scales are read as words of 32 bits where all members' can be."""
    ws = [CASES["mxfp4"](n, 128) for n in (24, 40)]
    apart = torch.empty(ws[1].scales.numel() + 1, dtype=ws[1].scales.dtype)[1:]
    ws[1] = ws[1]._replace(scales=apart.view(ws[1].scales.shape).copy_(ws[1].scales))
    x, a = matrix(1, 128, torch.float32, seed=0), matrix(4, 128, torch.float32, seed=1)
    Bs = [matrix(w.shape[0], 4, torch.float32, seed=2) for w in ws]
    ys = decode_quantised(x, ws, [a, a], Bs, 0.5)
    alone = [decode_quantised(x, [w], [a], [b], 0.5)[0] for w, b in zip(ws, Bs, strict=True)]
    assert all(map(torch.equal, ys, alone))


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_every_format(name: str, M: int) -> None:
    check(name, M, (40,), 136, 5, torch.float16)


@few
@given(
    name=st.sampled_from(sorted(CASES)),
    M=st.integers(1, 20),
    N=st.integers(1, 6),
    K=st.integers(1, 20),
    r=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([(8, 32), (16, 64), (32, 16)]),
)
def test_any_shape(
    name: str, M: int, N: int, K: int, r: int, dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    config = DecodeQuantisedConfig(*tile, split_k=3)
    check(name, M, (8 * N, 8), 8 * K, r, dtype, dtype, config)


@pytest.mark.parametrize("M", [1, 3, MAX_ROWS])
def test_groups_of_any_rank(M: int) -> None:
    check("nf4, nested", M, (48, 16, 24), 128, 3, torch.float16)
    check("fp8 by block", M, (8, 40), 72, 90, torch.float32, bias=False)


def test_blocks_that_run_on_from_row_to_row() -> None:
    for M in (1, 3):
        x, w = matrix(M, 34, torch.float16, seed=0), cases.nf4(7, 34, 64, True)
        a, b = torch.zeros(2, 34), torch.zeros(7, 2)
        y = decode_quantised(x, [w], [a], [b])[0]
        numbers = dense(w, torch.float16)
        assert_as_good_as_torch(y, blas(x, numbers.T).half(), x.double() @ numbers.double().T)


def test_configs_are_valid_on_every_architecture() -> None:
    for capability, sms, shared in ((80, 108, 166912), (90, 132, 232448), (120, 170, 101376)):
        arch = Arch(sms, capability, shared)
        for name in CASES:
            for M, K in ((1, 8), (1, 4096), (16, 4096), (64, 4096)):
                w = CASES[name](8, K)
                config = default_config(M, [4096], K, w, arch)
                assert config.block_n % w.layout.per == 0 or w.layout.along == "k"


def test_groups_that_would_spill_have_all_registers() -> None:
    def most(form: str, group: int, capability: int = 90, rows: int = 1) -> int | None:
        found = launches(
            rows, [512] * group, 512, [16] * group, Arch(132, capability, 101376), form
        )
        return found[-1].meta.get("maxnreg")

    for form in ("gptq", "awq", "nvfp4"):
        assert most(form, 2) == most(form, 3) == 255
        assert most(form, 1) is None and most(form, 2, 80) is None
        assert most(form, 3, 89, 16) == 255 and most(form, 3, 90, 16) is None
    for form in ("int8", "fp8", "int4", "mxfp4"):
        assert most(form, 3) is None, form
    for form, registers_ in (("nf4", 168), ("nf4 nested", 255)):  # a table, for Triton 3.9
        assert most(form, 1) == most(form, 3) == registers_
        assert most(form, 3, 80) is None and most(form, 3, 90, 16) is None
    assert registers(4) == registers(8) == 255 and registers(16) == 128
    assert registers(4, 3) == 168


def test_programs_with_all_registers_keep_as_many_bytes_on_the_way() -> None:
    """Two of them fit on a multiprocessor, not four: each loads further ahead."""
    arch = Arch(148, 100, 232448)
    one, two = ([28672], [14336, 14336])  # as many programs
    w = CASES["gptq"](8, 4096)
    alone, group = (default_config(1, ns, 4096, w, arch) for ns in (one, two))
    tile = group.block_n * group.block_k // 2
    assert alone.num_stages < group.num_stages
    assert 2 * arch.sms * (group.num_stages - 1) * tile >= needed(arch)


def test_empty_and_refused() -> None:
    x, w = torch.ones(2, 64), cases.nf4(8, 64)
    a, b = torch.ones(3, 64), torch.ones(8, 3)
    assert decode_quantised(x[:0], [w], [a], [b])[0].shape == (0, 8)
    with pytest.raises(ValueError, match="x has 65 rows; allowed: at most 64"):
        decode_quantised(torch.ones(65, 64), [w], [a], [b])
    with pytest.raises(ValueError, match=r"ws\[0\] has 64 columns; allowed: 32"):
        decode_quantised(torch.ones(2, 32), [w], [a], [b])
    with pytest.raises(ValueError, match=r"ws\[1\] has another layout"):
        decode_quantised(x, [w, cases.int8(8, 64)], [a, a], [b, b])
    with pytest.raises(ValueError, match=r"Bs\[0\] has shape"):
        decode_quantised(x, [w], [a], [b[:4]])
    with pytest.raises(TypeError, match=r"As\[0\] has dtype torch.float16"):
        decode_quantised(x, [w], [a.half()], [b])
    with pytest.raises(TypeError, match=r"ws\[0\] is a Tensor"):
        decode_quantised(x, [torch.ones(8, 64)], [a], [b])  # type: ignore[list-item]
    bad: Any = dict(split_k=0)
    with pytest.raises(ValueError, match="split_k is 0"):
        DecodeQuantisedConfig(**bad)
