"""The kernel that decodes in one launch, with one row and with up to sixteen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import reference
from peftkern.kernels.decode import MAX_ROWS, DecodeConfig, decode
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, blas, far_rows, few, matrix


def base(M, K, N, dtype, conv1d, bias):
    x = matrix(M, K, dtype, seed=0, offset=1)
    w = (
        matrix(K, N, dtype, seed=1, scale=0.2).T
        if conv1d
        else matrix(N, K, dtype, seed=1, scale=0.2)
    )
    return x, w, matrix(1, N, dtype, seed=2)[0] if bias else None


def check(M, K, N, r, dtype, adapter, conv1d=False, bias=False, given_s=False, config=None):
    x, w, c = base(M, K, N, dtype, conv1d, bias)
    a, b = matrix(r, K, adapter, seed=3, scale=0.2), matrix(N, r, adapter, seed=4, scale=0.2)
    s = reference.shrink(x, a, 2.0)
    low = 2.0 * (x @ a.to(dtype).T)
    if given_s:
        s = low = s.to(dtype)
        out = decode(x, w, None, b, bias=c, s=s, config=config)
    else:
        out = decode(x, w, a, b, 2.0, c, config=config)
    plain = x @ w.T + low @ b.to(dtype).T
    plain = [plain if c is None else plain + c]
    if dtype == torch.float32:
        # as the kernel's tiles are: W and B on the left, never fewer than 16 rows of x or outputs
        xs = torch.nn.functional.pad(x, (0, 0, 0, 16 - M)).T
        low = low.T if given_s else 2.0 * blas(a, xs)[:, :M]
        low = torch.nn.functional.pad(low, (0, 16 - M))
        wide = 16 * -(-N // 16) // N + 1
        y = (blas(b.repeat(wide, 1), low) + blas(w.repeat(wide, 1), xs))[:N, :M].T
        plain.append(y if c is None else y + c)
    assert_as_good_as_torch(out, plain, reference.linear(x, w, s, b, c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, N, r",
    [(1, 341, 41, 8), (1, 600, 9, 100), (9, 341, 41, 8), (16, 64, 100, 37), (3, 33, 1, 256)],
)
def test_against_float64(M, K, N, r, dtype):
    check(M, K, N, r, dtype, torch.float32, bias=True)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_s_and_conv1d_weight(M, dtype):
    check(M, 100, 70, 12, dtype, dtype, given_s=True)
    check(M, 100, 70, 12, dtype, dtype, conv1d=True)


@few
@given(
    M=st.integers(1, 6),
    K=st.integers(1, 150),
    N=st.integers(1, 80),
    r=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
)
def test_any_shape(M, K, N, r, dtype, same):
    adapter = dtype if same else torch.float32
    config = DecodeConfig(block_n=16, block_k=64)
    check(M, K, N, r, dtype, adapter, conv1d=same, config=config)


def test_offsets_past_int32():
    w = far_rows(3, 40, seed=0)
    x, a, b = (
        matrix(2, 40, torch.float16, seed=1),
        matrix(4, 40, torch.float32, seed=2),
        matrix(3, 4, torch.float32, seed=3),
    )
    for rows in (1, 2):
        exact = reference.linear(x[:rows], w, reference.shrink(x[:rows], a, 1.0), b)
        plain = x[:rows] @ w.T + (x[:rows] @ a.half().T) @ b.half().T
        assert_as_good_as_torch(decode(x[:rows], w, a, b), plain, exact)


def test_empty():
    assert decode(torch.ones(0, 4), torch.ones(7, 4), torch.ones(2, 4), torch.ones(7, 2)).shape == (
        0,
        7,
    )


def test_bad_arguments_are_named():
    x, w, a, b = torch.ones(2, 6), torch.ones(7, 6), torch.ones(3, 6), torch.ones(7, 3)
    with pytest.raises(ValueError, match=f"x has {MAX_ROWS + 1} rows; allowed: at most {MAX_ROWS}"):
        decode(torch.ones(MAX_ROWS + 1, 6), w, a, b)
    with pytest.raises(ValueError, match=r"w has shape \(7, 5\); allowed: \(7, 6\)"):
        decode(x, torch.ones(7, 5), a, b)
    with pytest.raises(ValueError, match=r"b has shape \(6, 3\); allowed: \(7, 3\)"):
        decode(x, w, a, torch.ones(6, 3))
    with pytest.raises(ValueError, match=r"a has shape \(1, 3, 6\); allowed: a matrix"):
        decode(x, w, a[None], b)
    with pytest.raises(ValueError, match="b has rank 0"):
        decode(x, w, torch.ones(0, 6), torch.ones(7, 0))
    with pytest.raises(ValueError, match="a and s: allowed: exactly one"):
        decode(x, w, None, b)
    with pytest.raises(ValueError, match="DecodeConfig.block_k is 8"):
        DecodeConfig(block_k=8)
