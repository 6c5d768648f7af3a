"""The fused GEMM, with tensor descriptors and with pointers: forward, and dX of a group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import gemm, reference
from peftkern.kernels.bits import pack_bits
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)

TMA = gemm.GemmConfig(32, 64, 32, tma=True, group_m=2, num_warps=4, num_stages=2)
POINTERS = gemm.GemmConfig(32, 64, 32, group_m=2, num_warps=4, num_stages=2)


def weight(N, K, dtype, seed, conv1d):
    """[N, K], or the transposed view of Conv1D's [K, N]."""
    return (
        matrix(K, N, dtype, seed=seed, scale=0.2).T
        if conv1d
        else matrix(N, K, dtype, seed=seed, scale=0.2)
    )


def check_linear(M, K, N, r, dtype, adapter, conv1d, bias, config, offset=0):
    x, w = matrix(M, K, dtype, seed=0, offset=offset), weight(N, K, dtype, 1, conv1d)
    s, b = matrix(M, r, dtype, seed=2, offset=1), matrix(N, r, adapter, seed=3, scale=0.3)
    c = matrix(1, N, dtype, seed=4)[0] if bias else None
    plain = x @ w.T + s @ b.to(dtype).T
    plain = plain if c is None else plain + c
    out = gemm.fused_linear(x, w, s, b, c, config=config)
    assert_as_good_as_torch(out, plain, reference.linear(x, w, s, b, c))


def check_grad_input(M, K, widths, ranks, dtype, adapter, conv1d, masks, config):
    dys = [matrix(M, n, dtype, seed=i) for i, n in enumerate(widths)]
    ws = [weight(n, K, dtype, 5 + i, conv1d) for i, n in enumerate(widths)]
    ds = [matrix(M, r, dtype, seed=10 + i, offset=1) for i, r in enumerate(ranks)]
    As = [matrix(r, K, adapter, seed=15 + i, scale=0.3) for i, r in enumerate(ranks)]
    keeps = [None if c == "n" else keep_mask(M, K, i) for i, c in enumerate(masks)]
    words = [None if k is None else pack_bits(k) for k in keeps]
    out = gemm.fused_grad_input(dys, ws, ds, As, words, config=config)
    plain = sum(d @ w for d, w in zip(dys, ws, strict=True))
    plain = plain + sum(masked(d @ a.to(dtype), k) for d, a, k in zip(ds, As, keeps, strict=True))
    assert_as_good_as_torch(out, plain, reference.grad_input(dys, ws, ds, As, keeps))


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_linear_against_float64(dtype, conv1d, config):
    check_linear(50, 72, 136, 8, dtype, torch.float32, conv1d, True, config)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_input_of_a_group_against_float64(dtype, config):
    check_grad_input(50, 72, (136, 40, 40), (8, 20, 3), dtype, torch.float32, False, "mnm", config)


@few
@given(
    M=st.integers(1, 60),
    K=st.integers(1, 80),
    N=st.integers(1, 90),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    conv1d=st.booleans(),
    tma=st.booleans(),
)
def test_any_shape(M, K, N, r, dtype, same, conv1d, tma):
    adapter, config = dtype if same else torch.float32, TMA if tma else POINTERS
    check_linear(M, K, N, r, dtype, adapter, conv1d, same, config)
    check_grad_input(M, K, (N, 17), (r, 5), dtype, adapter, conv1d, "mn" if same else "nn", config)


def test_odd_rows_fall_back_to_pointers_and_large_ranks_are_chunked():
    check_linear(9, 341, 41, 100, torch.bfloat16, torch.float32, False, False, TMA, offset=1)


def test_descriptors_are_used_where_they_can_be():
    x, y, w = torch.ones(32, 64), torch.ones(32, 64), torch.ones(64, 64)
    arch = gemm.Arch(4, 90, 232448)

    def uses_tma(x, w):
        return gemm.plan_gemm(y, [x], [w], [], [], [], None, arch, TMA)[0].meta["TMA"]

    assert uses_tma(x, w) and uses_tma(x, w.T)
    assert not uses_tma(torch.ones(32, 65)[:, :64], w)
    assert not uses_tma(torch.ones(32, 64 + 4)[:, 1:65], w)


def test_without_adapter_and_without_one_in_a_group():
    x, w = matrix(9, 40, torch.float32, seed=0), matrix(24, 40, torch.float32, seed=1)
    assert_as_good_as_torch(gemm.fused_linear(x, w), x @ w.T, reference.linear(x, w))
    check_grad_input(20, 40, (24, 16), (4,), torch.float16, torch.float32, False, "m", POINTERS)


def test_default_config_runs_a_persistent_grid():
    check_linear(300, 40, 600, 8, torch.float16, torch.float32, False, False, None)


def test_offsets_past_int32():
    x, w = far_rows(3, 40, seed=0), matrix(24, 40, torch.float16, seed=1)
    for config in (TMA, POINTERS):
        assert_as_good_as_torch(
            gemm.fused_linear(x, w, config=config), x @ w.T, reference.linear(x, w)
        )


def test_empty():
    assert gemm.fused_linear(torch.ones(0, 4), torch.ones(7, 4)).shape == (0, 7)
    assert gemm.fused_linear(torch.ones(3, 0), torch.ones(7, 0), bias=torch.ones(7)).eq(1).all()


def test_bad_arguments_are_named():
    x, w, s, b = torch.ones(5, 6), torch.ones(7, 6), torch.ones(5, 4), torch.ones(7, 4)
    with pytest.raises(ValueError, match=r"w has shape \(7, 5\); allowed: \(7, 6\)"):
        gemm.fused_linear(x, torch.ones(7, 5))
    with pytest.raises(TypeError, match="w has dtype torch.float16; allowed: torch.float32"):
        gemm.fused_linear(x, w.half())
    with pytest.raises(ValueError, match="s and b: allowed: both, or neither"):
        gemm.fused_linear(x, w, s)
    with pytest.raises(ValueError, match=r"b has shape \(6, 4\); allowed: \(7, 4\)"):
        gemm.fused_linear(x, w, s, torch.ones(6, 4))
    with pytest.raises(ValueError, match="w is on meta; allowed: cpu"):
        gemm.fused_linear(x, w.to("meta"), s, b)
    with pytest.raises(ValueError, match="dys has 1 entries, ws 2"):
        gemm.fused_grad_input([torch.ones(5, 7)], [w, w], [], [])
    with pytest.raises(ValueError, match=r"ws\[1\] has shape \(7, 5\); allowed: \(7, 6\)"):
        gemm.fused_grad_input([torch.ones(5, 7)] * 2, [w, torch.ones(7, 5)], [], [])
    with pytest.raises(ValueError, match=r"As\[0\] has shape \(4, 7\); allowed: \(4, 6\)"):
        gemm.fused_grad_input([torch.ones(5, 7)], [w], [s], [torch.ones(4, 7)])
    with pytest.raises(
        ValueError, match="config needs 294912 bytes of shared memory; allowed: 232448"
    ):
        gemm.fused_linear(x.half(), w.half(), config=gemm.GemmConfig(128, 256, 128, num_stages=3))
    with pytest.raises(ValueError, match="GemmConfig.group_m is 0"):
        gemm.GemmConfig(group_m=0)
