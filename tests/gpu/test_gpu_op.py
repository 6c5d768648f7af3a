"""The whole operation on the device: gradients, determinism, graphs, memory and precision.

Precision is compared with HF PEFT's.
"""

import peft
import pytest
import torch
from torch import nn

import peftkern
from tests.gpu.ground import (
    DEVICE,
    DTYPES,
    ON_CPU,
    backend,
    cut,
    poison,
    reference,
    relative,
    some,
    triton_backend,
)

BF16, FP32 = torch.bfloat16, torch.float32
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(params=triton_backend.PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setattr(triton_backend, "product", request.param)
    with backend.use_backend("triton"):
        yield request.param


def tensors(M, K, N, r, dtype, adapter=FP32, grad=True):
    x, w = some(M, K, dtype=dtype), some(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    A = some(r, K, dtype=FP32, seed=2, scale=K**-0.5).to(adapter)
    B = some(N, r, dtype=FP32, seed=3, scale=r**-0.5).to(adapter)
    for t in (x, A, B):
        t.requires_grad_(grad)
    return x, w, A, B, some(M, N, dtype=dtype, seed=4)


def mask_of(y, K):
    """The mask of a forward, out of what its node saved."""
    (words,) = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.int32]
    from peftkern.ops.bits import unpack_bits

    return unpack_bits(words, K, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(37, 341, 41, 5), (4095, 4096, 4096, 16), (300, 1024, 4096, 64)], ids=str
)
def test_forward_and_backward_against_float64(product, shape, p, dtype):
    M, K, N, r = cut(*shape)
    x, w, A, B, dy = tensors(M, K, N, r, dtype)
    torch.manual_seed(0)
    poison()
    y = peftkern.lora_linear(x, w, None, A, B, 2.0, p)
    keep = mask_of(y, K) if p else None
    found = torch.autograd.grad(y, (x, A, B), dy)
    c = 2.0 / (1 - p)
    s, ds = reference.shrink(x, A, c, keep), reference.grad_s(dy, B, c)
    exact = {
        "y": reference.linear(x, w, s, B.detach()),
        "dx": reference.grad_input([dy], [w], [ds], [A], [keep]),
        "da": reference.grad_a(x, ds, keep),
        "db": reference.grad_b(dy, s),
    }
    for (what, want), got in zip(exact.items(), (y, *found), strict=True):
        error = relative(got.detach(), want)
        assert error <= LIMIT[dtype], f"{what}: {error:.2e}"
    if p and not ON_CPU and M > 1000:
        assert abs(keep.double().mean().item() - 0.9) < 0.002


def test_two_backward_passes_are_bit_equal(product):
    M, K, N, r = cut(4095, 4096, 1024, 16)
    x, w, A, B, dy = tensors(M, K, N, r, BF16)
    passes = []
    for _ in range(2):
        torch.manual_seed(1)
        y = peftkern.lora_linear(x, w, None, A, B, 2.0, 0.1)
        poison()
        passes.append((y, *torch.autograd.grad(y, (x, A, B), dy, retain_graph=True)))
        passes.append((y, *torch.autograd.grad(y, (x, A, B), dy)))
    for again in passes[1:]:
        for first, second in zip(passes[0], again, strict=True):
            assert torch.equal(first, second)


def test_a_strided_input_and_a_subset_of_gradients(product):
    M, K, N, r = cut(130, 256, 320, 16)
    x, w, A, B, dy = tensors(M, K, N, r, BF16, grad=False)
    wide = torch.cat([x, x], 1)[:, 5 : 5 + K]  # rows twice as long, unaligned
    want = peftkern.lora_linear(wide.contiguous(), w, None, A, B, 1.0)
    got = peftkern.lora_linear(wide, w, None, A, B, 1.0)
    assert relative(got, want.double()) < 6e-3
    for wanted in ((x,), (A,), (B,), (x, B)):
        for t in (x, A, B):
            t.requires_grad_(any(t is v for v in wanted))
        y = peftkern.lora_linear(x, w, None, A, B, 1.0)
        for got in torch.autograd.grad(y, wanted, dy):
            assert bool(got.isfinite().all()) and bool(got.any())


def adapted(library, M, K, N, r, p, fp32):
    """A PEFT layer around a drawn linear, with drawn adapters that bf16 cannot hold exactly."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N, bias=False, device=DEVICE, dtype=BF16))
    base[0].weight.data = some(N, K, seed=1, scale=K**-0.5)
    config = library.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"])
    model = library.get_peft_model(base, config, autocast_adapter_dtype=fp32)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(some(r, K, dtype=FP32, seed=2, scale=K**-0.5))
        layer.lora_B["default"].weight.copy_(some(N, r, dtype=FP32, seed=3, scale=r**-0.5))
    return layer


def errors_of(layer, x, dy):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(x)
    grads = torch.autograd.grad(y, (x, A, B), dy)
    w = layer.base_layer.weight
    s, ds = reference.shrink(x, A, 2.0), reference.grad_s(dy, B, 2.0)
    exact = (
        reference.linear(x, w, s, B),
        reference.grad_input([dy], [w], [ds], [A], [None]),
        reference.grad_a(x, ds),
        reference.grad_b(dy, s),
    )
    names = ("y", "dx", "da", "db")
    return {n: relative(g.detach(), e) for n, g, e in zip(names, (y, *grads), exact, strict=True)}


def errors_beside(adapters_fp32):
    """(peftkern's errors, HF PEFT's) on the same case, by the weights that each layer holds."""
    M, K, N, r = cut(2048, 2048, 2048, 16)
    x, dy = some(M, K).requires_grad_(), some(M, N, seed=4)
    return [
        errors_of(adapted(library, M, K, N, r, 0.0, adapters_fp32), x, dy)
        for library in (peftkern, peft)
    ]


def test_bf16_adapters_are_as_exact_as_hf_pefts(product):
    ours, theirs = errors_beside(False)
    for what, error in ours.items():
        assert error <= 1.05 * theirs[what], (what, ours, theirs)


@pytest.mark.xfail(
    strict=True,
    reason="low-rank products run in bf16 (docs/goals.md, Precision); PEFT's default uses fp32",
)
def test_fp32_adapters_on_bf16_are_as_exact_as_hf_pefts(product):
    ours, theirs = errors_beside(True)
    for what, error in ours.items():
        assert error <= 1.05 * theirs[what], (what, ours, theirs)


def test_fp32_adapters_on_bf16_lose_no_more_than_the_rounding_of_their_products(product):
    """Y and dX err at most 2.2 times as PEFT's default does, dA and dB by bf16's rounding."""
    ours, theirs = errors_beside(True)
    for what in ("y", "dx"):
        assert ours[what] <= 2.2 * theirs[what], (what, ours, theirs)
    assert max(ours["da"], ours["db"]) <= 3e-3, ours


@pytest.mark.skipif(ON_CPU, reason="counts the device's memory")
def test_what_is_kept_for_backward():
    M, K, N, r, p = 8192, 4096, 4096, 16, 0.1
    with backend.use_backend("triton"):
        x, w, A, B, dy = tensors(M, K, N, r, BF16)
        torch.autograd.grad(peftkern.lora_linear(x, w, None, A, B, 2.0, p), (x, A, B), dy)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = peftkern.lora_linear(x, w, None, A, B, 2.0, p)
        kept = torch.cuda.memory_allocated() - before - y.numel() * 2
    assert kept <= 4.5e6, f"{kept} bytes: more than S and the packed mask"


@pytest.mark.skipif(ON_CPU, reason="CUDA graphs")
@pytest.mark.parametrize("M", [1, 16])
def test_decode_in_a_graph(M):
    x, w, A, B, _ = tensors(M, 2048, 2048, 16, BF16, grad=False)
    with backend.use_backend("triton"), torch.no_grad():
        for _ in range(2):
            peftkern.lora_linear(x, w, None, A, B, 2.0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = peftkern.lora_linear(x, w, None, A, B, 2.0)
        for seed in (7, 8):
            x.copy_(some(M, 2048, seed=seed))
            A.copy_(some(16, 2048, dtype=FP32, seed=seed + 10, scale=0.02))
            y.fill_(float("nan"))
            graph.replay()
            exact = reference.linear(x, w, reference.shrink(x, A, 2.0), B)
            assert relative(y, exact) < LIMIT[BF16]


@pytest.mark.skipif(ON_CPU, reason="CUDA graphs")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_training_step_in_a_graph(product, p):
    M, K, N, r = 512, 1024, 1024, 16
    x, w, A, B, dy = tensors(M, K, N, r, BF16)

    def step():
        y = peftkern.lora_linear(x, w, None, A, B, 2.0, p)
        keep = mask_of(y, K) if p else None
        return (y, *torch.autograd.grad(y, (x, A, B), dy)), keep

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y, dx, da, db), keep = step()
    masks = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        c = 2.0 / (1 - p)
        s, ds = reference.shrink(x, A, c, keep), reference.grad_s(dy, B, c)
        for got, want in (
            (y, reference.linear(x, w, s, B)),
            (dx, reference.grad_input([dy], [w], [ds], [A], [keep])),
            (da, reference.grad_a(x, ds, keep)),
            (db, reference.grad_b(dy, s)),
        ):
            assert relative(got.detach(), want) < LIMIT[BF16]
        masks.append(keep.clone() if p else None)
    if p:
        assert not torch.equal(*masks)  # every replay draws anew
