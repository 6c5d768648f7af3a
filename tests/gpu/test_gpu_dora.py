"""DoRA on the device: its kernels with their own configs, and the whole operation."""

import pytest
import torch

from tests.gpu.ground import (
    DTYPES,
    ON_CPU,
    as_good_as_torch,
    backend,
    cut,
    poison,
    relative,
    some,
    triton_backend,
)

# after the ground, which skips where nothing may be imported
from peftkern.kernels import dora_grad, dora_norm  # noqa: E402  isort: skip
from peftkern.ops.dora import dora_linear  # noqa: E402  isort: skip

FP32 = torch.float32
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 1e-3, FP32: 1e-5}
SHAPES = [(4096, 4096, 16), (14336, 4096, 64), (1000, 333, 5), (4096, 1024, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_norms(shape, dtype, transposed):
    N, K, r = cut(*shape)
    w = some(K, N, dtype=dtype).T if transposed else some(N, K, dtype=dtype, gap=1)
    for adapter in {FP32, dtype}:
        A, B = some(r, K, dtype=adapter, seed=1), some(N, r, dtype=adapter, seed=2)
        poison()
        found = dora_norm.row_norms(w, A, B, 0.5)
        plain = torch.linalg.vector_norm(w.float() + 0.5 * (B.float() @ A.float()), dim=1)
        as_good_as_torch(found, plain, dora_norm.reference(w, A, B, 0.5))
        assert torch.equal(found, dora_norm.row_norms(w, A, B, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8192, 4096), (37, 333), (1, 4096)], ids=str)
def test_the_gradient_of_the_gain(shape, dtype):
    M, N = cut(*shape)
    dy, v, bias = some(M, N, dtype=dtype), some(M, N, dtype=dtype, seed=1), some(N, dtype=dtype)
    gain = some(N, dtype=FP32, seed=2)
    poison()
    dz, sums = dora_grad.scale_grad(dy, gain, v, bias)
    exact_dz, exact_sums = dora_grad.reference(dy, gain, v, bias)
    as_good_as_torch(dz, (dy * gain).to(dtype), exact_dz)
    as_good_as_torch(sums, (dy.float() * (v.float() - bias.float())).sum(0), exact_sums)


@pytest.mark.parametrize("product", triton_backend.PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 341, 41, 5), (4095, 4096, 4096, 16)], ids=str)
def test_the_operation_against_float64(monkeypatch, product, shape, dtype):
    monkeypatch.setattr(triton_backend, "product", product)
    M, K, N, r = cut(*shape)
    x, w = some(M, K, dtype=dtype), some(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    A, B = some(r, K, dtype=FP32, seed=2, scale=K**-0.5), some(N, r, dtype=FP32, seed=3, scale=0.1)
    bias, dy = some(N, dtype=dtype, seed=5), some(M, N, dtype=dtype, seed=4)
    m = some(N, dtype=FP32, seed=6).abs() + 0.5

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = dora_linear(leaves[0], w.to(x.dtype), bias.to(x.dtype), *leaves[1:], 2.0)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    poison()
    with backend.use_backend("triton"):
        found, again = run(x, A, B, m), run(x, A, B, m)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    x, w, A, B = x.double(), w.double(), A.double(), B.double()
    with backend.use_backend("torch"):
        exact = run(x, A, B, m.double())
    for what, got, want in zip(("y", "dx", "da", "db", "dm"), found, exact, strict=True):
        error = relative(got, want)
        assert error <= LIMIT[dtype], f"{what}: {error:.2e}"


@pytest.mark.skipif(ON_CPU, reason="counts device memory")
def test_norms_take_no_matrix():
    w, A, B = some(8192, 8192), some(16, 8192, dtype=FP32), some(8192, 16, dtype=FP32)
    dora_norm.row_norms(w, A, B)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dora_norm.row_norms(w, A, B)
    assert torch.cuda.max_memory_allocated() - before < 2**21
