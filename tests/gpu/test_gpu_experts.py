"""A mixture's operation on the device: values and gradients, determinism, graphs."""

import pytest
import torch
from torch.nn import functional as F

from peftkern.ops.experts.double import plain_call
from peftkern.ops.experts.parts import Call, ExpertLinear, Factors, Gate
from peftkern.ops.lora_experts import lora_experts
from tests.gpu.ground import DTYPES, ON_CPU, as_good_as_torch, backend, poison, some

BF16, FP32 = torch.bfloat16, torch.float32
# tokens, in, inner, experts, choices, rank: few rows an expert, many, sizes that nothing divides
SHAPES = [(300, 256, 192, 64, 8, 16), (2048, 512, 256, 8, 2, 64), (65, 136, 72, 5, 3, 7)]


def halves(gu):
    g, u = gu.chunk(2, 1)
    return F.silu(g) * u


def clamped(gu):
    g, u = gu[:, 0::2].clamp(max=7.0), gu[:, 1::2].clamp(-7.0, 7.0)
    return g * torch.sigmoid(1.702 * g) * (u + 1)


GATES = {
    "silu": Gate(halves, "silu"),
    "clamped": Gate(clamped, None, "interleaved", (1.702, 7.0, 1.0)),
}


@pytest.fixture(autouse=True)
def kernels():
    with backend.use_backend("triton"):
        yield


def linear(E, N, K, r, dtype, low, seed, transposed, bias, p=0.0):
    w = some(E, N, K, dtype=dtype, seed=seed, scale=K**-0.5)
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    A = some(r * E, K, dtype=low, seed=seed + 1, scale=K**-0.5).requires_grad_()
    B = some(N, r * E, dtype=low, seed=seed + 2, scale=r**-0.5).requires_grad_()
    b = some(E, N, dtype=dtype, seed=seed + 3) if bias else None
    return ExpertLinear(w, b, (Factors(A, B, 2.0, p),))


def mixture(shape, dtype=BF16, low=FP32, gate="silu", p=0.0):
    """The arguments of ``lora_experts``; expert 1 gets no token."""
    T, D, inner, E, k, r = shape
    if ON_CPU:
        T, D, inner, E, k = (
            min(n, most) for n, most in zip(shape, (20, 40, 24, 6, 3), strict=False)
        )
    logits = some(T, E, dtype=FP32, seed=9)
    logits[:, 1] = float("-inf")
    weights, index = logits.topk(min(k, E - 1), 1)
    other = gate == "clamped"  # as in gpt-oss: transposed, with biases
    up, down = (
        linear(E, n, d, r, dtype, low, seed, other, other, p)
        for n, d, seed in ((2 * inner, D, 10), (D, inner, 20))
    )
    x = some(T, D, dtype=dtype, seed=1).requires_grad_()
    weights = weights.softmax(1).to(dtype).requires_grad_()
    return x, index, weights, up, down, GATES[gate]


def leaves(m):
    return [m[0], m[2], *(t for part in m[3:5] for f in part.factors for t in (f.A, f.B))]


def cast(m, dtype):
    """The same numbers in ``dtype``, as leaves."""

    def to(t):
        return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

    x, index, weights, *parts, gate = m
    made = []
    for weight, bias, factors in parts:
        low = tuple(f._replace(A=to(f.A), B=to(f.B)) for f in factors)
        made.append(ExpertLinear(to(weight), to(bias), low))
    return to(x), index, to(weights), *made, gate


def numbers(m, function):
    """Out and all gradients."""
    y = function(*m)
    g = torch.Generator(device=y.device).manual_seed(5)
    dy = torch.randn(y.shape, generator=g, device=y.device, dtype=FP32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves(m), dy)]


def formula(*m):
    return plain_call(Call(*m, None, None, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_against_float64(shape, gate, dtype):
    m = mixture(shape, dtype, dtype, gate)
    poison()
    ours = numbers(m, lora_experts)
    exact = numbers(cast(m, torch.float64), formula)
    for got, plain, want in zip(ours, numbers(m, formula), exact, strict=True):
        as_good_as_torch(got, plain, want)


@pytest.mark.parametrize("gate", GATES)
def test_two_passes_with_dropout_are_bit_equal(gate):
    m, passes = mixture(SHAPES[0], gate=gate, p=0.1), []
    for _ in range(2):
        torch.manual_seed(1)
        poison()
        passes.append(numbers(m, lora_experts))
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 8, 300], ids="T{}".format)
def test_a_graph_computes_what_a_call_does(T, gate):
    _, D, inner, E, k, r = SHAPES[0]
    if ON_CPU:
        pytest.skip("there are no graphs")
    x, index, weights, *rest = mixture((T, D, inner, E, k, r), gate=gate)
    with torch.no_grad():
        other = (x.flip(1), (index + 1) % E, weights.flip(1))
        want = [lora_experts(*args, *rest) for args in ((x, index, weights), other)]
        held = [t.clone() for t in (x, index, weights)]
        for _ in range(3):
            lora_experts(*held, *rest)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = lora_experts(*held, *rest)
        for args, expected in zip((other, (x, index, weights)), want[::-1], strict=True):
            for into, value in zip(held, args, strict=True):
                into.copy_(value)
            graph.replay()
            assert torch.equal(out, expected)


def test_a_step_in_a_graph_is_that_outside():
    if ON_CPU:
        pytest.skip("there are no graphs")
    m = mixture(SHAPES[0])
    dy = torch.ones_like(m[0])

    def step():
        return torch.autograd.grad(lora_experts(*m), leaves(m), dy)

    want = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)


def test_torchs_grouped_products_give_the_same():
    m = mixture(SHAPES[0])
    ours = numbers(m, lora_experts)
    with backend.use_backend("torch"):
        torchs = numbers(m, lora_experts)
    exact = numbers(cast(m, torch.float64), formula)
    for got, plain, want in zip(torchs, ours, exact, strict=True):
        as_good_as_torch(got, plain, want)
