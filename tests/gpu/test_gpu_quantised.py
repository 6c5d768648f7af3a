"""Quantised weights on the device: dequantised bit for bit, and few rows against float64."""

import pytest
import torch

from tests.gpu.ground import DEVICE, DTYPES, ON_CPU, as_good_as_torch, cut, poison, reference, some

# after the ground, which skips where nothing may be imported
from peftkern.kernels.decode_quantised import decode_quantised  # noqa: E402  isort: skip
from peftkern.kernels.dequantise import dequantise  # noqa: E402  isort: skip
from peftkern.kernels.quantised import Quantised, dense  # noqa: E402  isort: skip
from tests.closeness import assert_as_good_as_torch  # noqa: E402  isort: skip
from tests.kernels.quantised_cases import CASES  # noqa: E402  isort: skip

FP32 = torch.float32


def there(w: Quantised) -> Quantised:
    """The weight with its tensors on the device, of the same strides."""
    moved = {
        n: t.to(DEVICE) for n, t in zip(w._fields[2:], w.tensors, strict=True) if t is not None
    }
    return w._replace(**moved)


@pytest.mark.parametrize("name", CASES)
def test_every_format_is_dequantised_bit_for_bit(name):
    for N, K in (cut(136, 264), cut(1024, 4096)):
        N, K = N // 8 * 8, K // 8 * 8
        w = CASES[name](N, K)
        for dtype in DTYPES:
            poison()
            assert torch.equal(dequantise(there(w), dtype).cpu(), dense(w, dtype)), (N, K, dtype)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_own_kernel_gives_the_same(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    from peftkern.kernels.quantised_formats import bnb4

    N, K = cut(1000, 4096)
    K = K // 64 * 64
    bits, state = functional.quantize_4bit(
        some(N, K, dtype=FP32), quant_type="nf4", compress_statistics=nested
    )
    inner = None
    if nested:
        inner = state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize
    w = bnb4(bits, state.code, state.absmax, (N, K), state.blocksize, inner)
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(dequantise(w, dtype), functional.dequantize_4bit(bits, state))


@pytest.mark.parametrize("M", [1, 16, 64])
@pytest.mark.parametrize("name", CASES)
def test_few_rows_against_float64(name, M):
    N, K = (n // 8 * 8 for n in cut(1000, 4096))
    Ns = (N, 8)
    for dtype in DTYPES[:1] if ON_CPU else DTYPES:
        ws = [there(CASES[name](n, K)) for n in Ns]
        x = some(M, K, dtype=dtype, gap=3)
        numbers = [dense(w, dtype) for w in ws]
        As = [some(r, K, dtype=FP32, seed=r, scale=0.1) for r in (16, 5)]
        Bs = [some(n, a.shape[0], dtype=FP32, seed=n) for n, a in zip(Ns, As, strict=True)]
        bias = some(N, dtype=dtype, seed=4)
        given = x, ws, As, Bs, [2.0, 0.5], [bias, None]
        poison()
        ys, again = decode_quantised(*given), decode_quantised(*given)
        assert all(map(torch.equal, ys, again)), "two runs differ"
        for y, w, a, b, scale, c in zip(ys, numbers, As, Bs, (2.0, 0.5), (bias, None), strict=True):
            exact = reference.linear(x, w, reference.shrink(x, a, scale), b)
            plain = x @ w.T + (scale * (x @ a.to(dtype).T)) @ b.to(dtype).T
            if c is not None:
                exact, plain = exact + c.double(), plain + c
            as_good_as_torch(y, plain, exact)
            if not ON_CPU:
                assert_as_good_as_torch(y, plain, exact)


@pytest.mark.skipif(ON_CPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["nf4, nested", "mxfp4", "gptq, act-order"])
def test_in_a_cuda_graph(name):
    ws = [there(CASES[name](512, 1024))]
    x, a = some(1, 1024), some(16, 1024, dtype=FP32, seed=1)
    given = x, ws, [a], [some(512, 16, dtype=FP32, seed=2)]
    wanted = decode_quantised(*given)[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = decode_quantised(*given)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)
