"""DoRA's kernels: norms that read W once, the gain in the fused product, and its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import dora_grad, dora_norm, reference
from peftkern.kernels.dora_grad import ScaleConfig, scale_grad
from peftkern.kernels.dora_norm import NormConfig, row_norms
from peftkern.kernels.gemm import GemmConfig, fused_linear
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few, matrix


def check_norms(N, K, r, dtype, adapter, transposed=False, config=None):
    w = matrix(N, K, dtype, seed=0, offset=1)
    w = w.T.contiguous().T if transposed else w
    a, b = matrix(r, K, adapter, seed=1, offset=2), matrix(r, N, adapter, seed=2).T
    out = row_norms(w, a, b, 0.3, config=config)
    plain = torch.linalg.vector_norm(w.float() + 0.3 * (b.float() @ a.float()), dim=1)
    assert out.dtype == torch.float32
    assert_as_good_as_torch(out, plain, dora_norm.reference(w, a, b, 0.3))
    assert torch.equal(out, row_norms(w, a, b, 0.3, config=config)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K, r", [(9, 341, 8), (70, 33, 37), (1, 7, 1), (20, 40, 200)])
def test_norms_against_float64(N, K, r, dtype):
    for adapter in {torch.float32, dtype}:
        check_norms(N, K, r, dtype, adapter)


@few
@given(
    N=st.integers(1, 80),
    K=st.integers(1, 150),
    r=st.integers(1, 70),
    transposed=st.booleans(),
    split=st.integers(1, 3),
)
def test_norms_of_any_shape(N, K, r, transposed, split):
    config = NormConfig(block_n=16, block_k=32, split_k=split)
    check_norms(N, K, r, torch.float16, torch.float32, transposed, config)


def check_grad(M, N, dtype, bias, config=None):
    dy, v = matrix(M, N, dtype, seed=0, offset=1), matrix(M, N, dtype, seed=1, offset=2)
    gain, c = matrix(1, N, torch.float32, seed=2)[0], matrix(1, N, dtype, seed=3)[0]
    c = c if bias else None
    dz, sums = scale_grad(dy, gain, v, c, config=config)
    exact_dz, exact_sums = dora_grad.reference(dy, gain, v, c)
    assert dz.dtype == dtype and sums.dtype == torch.float32
    assert_as_good_as_torch(dz, (dy * gain).to(dtype), exact_dz)
    z = v.float() if c is None else v.float() - c.float()
    assert_as_good_as_torch(sums, (dy.float() * z).sum(0), exact_sums)
    again = scale_grad(dy, gain, v, c, config=config)
    assert torch.equal(dz, again[0]) and torch.equal(sums, again[1]), "two runs differ"
    alone = scale_grad(dy, gain, v, c, wanted=False, config=config)
    assert alone[0] is None and torch.equal(alone[1], sums)
    only = scale_grad(dy, gain, config=config)
    assert only[1] is None and torch.equal(only[0], dz)


@few
@given(
    M=st.integers(1, 90),
    N=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    split=st.integers(1, 3),
)
def test_gradients_of_any_shape(M, N, dtype, bias, split):
    check_grad(M, N, dtype, bias)
    check_grad(M, N, dtype, bias, ScaleConfig(block_m=16, block_n=32, split_m=split))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_gain_in_the_epilogue(dtype, bias, tma):
    M, N, K, r = (40, 72, 96, 8) if tma else (41, 70, 90, 5)
    x, w = matrix(M, K, dtype, seed=0), matrix(N, K, dtype, seed=1)
    s, b = matrix(M, r, dtype, seed=2), matrix(N, r, torch.float32, seed=3)
    c = matrix(1, N, dtype, seed=4)[0].contiguous() if bias else None
    gain = 1 + matrix(1, N, torch.float32, seed=5)[0]
    config = GemmConfig(32, 32, 32, tma=tma, num_warps=4)
    v = x.new_empty(M, N)
    y = fused_linear(x, w, s, b, c, gain=gain, v=v, config=config)
    assert torch.equal(v, fused_linear(x, w, s, b, c, config=config)), "V is the plain product"
    assert torch.equal(y, fused_linear(x, w, s, b, c, gain=gain, config=config))
    exact = reference.linear(x, w, s, b)
    plain = x @ w.T + s @ b.to(dtype).T
    add = 0 if c is None else c
    assert_as_good_as_torch(y, (gain * plain + add).to(dtype), gain.double() * exact + add)


def test_offsets_past_int32():
    w, a, b = far_rows(3, 40, seed=0), matrix(8, 40, torch.float32, seed=1), far_rows(3, 8, seed=2)
    plain = torch.linalg.vector_norm(w.float() + b.float() @ a, dim=1)
    assert_as_good_as_torch(row_norms(w, a, b), plain, dora_norm.reference(w, a, b, 1.0))
    gain = torch.ones(40)
    dz, sums = scale_grad(w, gain, w)
    assert torch.equal(dz, w)
    assert_as_good_as_torch(sums, w.float().square().sum(0), w.double().square().sum(0))


def test_empty_and_refused():
    assert row_norms(torch.ones(0, 6), torch.ones(2, 6), torch.ones(0, 2)).shape == (0,)
    dz, sums = scale_grad(torch.ones(0, 6), torch.ones(6), torch.ones(0, 6))
    assert dz.shape == (0, 6) and not sums.any()
    with pytest.raises(ValueError, match="b has shape"):
        row_norms(torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 3))
    with pytest.raises(TypeError, match="w has dtype torch.float64"):
        row_norms(torch.ones(4, 6).double(), torch.ones(2, 6), torch.ones(4, 2))
    with pytest.raises(ValueError, match="gain has shape"):
        scale_grad(torch.ones(4, 6), torch.ones(5))
    with pytest.raises(ValueError, match="v: allowed: with gain"):
        fused_linear(torch.ones(4, 6), torch.ones(5, 6), v=torch.ones(4, 5))
