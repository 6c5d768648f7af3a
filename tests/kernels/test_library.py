"""The operators of torch.library on the kernels."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import peftkern
from peftkern.kernels.bits import reference_bits
from peftkern.ops import bits, library, masks, triton_backend  # noqa: F401 (registers the operators)
from tests.closeness import assert_as_good_as_torch

ops = torch.ops.peftkern


@pytest.fixture(autouse=True)
def on_triton():
    torch._dynamo.reset()
    with peftkern.use_backend("triton"):
        yield
    torch._dynamo.reset()


def arguments(
    lead=(2, 3), dtype=torch.float32, low=torch.float32, bias=True, transposed=False, p=0.0
):
    """Arguments of ``lora_linear``: x, weight, bias, A, B, scale, p, seed, transposed."""
    g = torch.Generator().manual_seed(0)
    K, N, r = 40, 24, 3

    def leaf(*shape, dtype=dtype):
        drawn = torch.randn(*shape, generator=g) / shape[-1] ** 0.5
        return drawn.to(dtype).requires_grad_()

    weight = leaf(*((K, N) if transposed else (N, K)))
    A, B = leaf(r, K, dtype=low), leaf(N, r, dtype=low)
    seed = torch.tensor([2**40 + 5]) if p else None
    return leaf(*lead, K), weight, leaf(N) if bias else None, A, B, 0.7, p, seed, transposed


def detached(args):
    return [a.detach() if isinstance(a, Tensor) else a for a in args]


cases = pytest.mark.parametrize(
    ("dtype", "low", "bias", "transposed", "p"),
    [
        (torch.float32, torch.float32, True, False, 0.0),
        (torch.float32, torch.float32, False, True, 0.3),
        (torch.bfloat16, torch.float32, True, True, 0.3),
        (torch.bfloat16, torch.bfloat16, False, False, 0.0),
        (torch.float16, torch.float16, True, False, 0.3),
        (torch.float64, torch.float64, True, False, 0.3),  # the kernels hand it to torch
    ],
    ids=str,
)


@cases
def test_opcheck(dtype, low, bias, transposed, p):
    """Schema, autograd registration, fake results and ahead-of-time graphs with dynamic shapes."""
    args = arguments((2, 3), dtype, low, bias, transposed, p)
    torch.library.opcheck(ops.lora_linear.default, args)
    x, weight, bias, A, B, scale, p, _, _ = plain = detached(args)
    torch.library.opcheck(ops.lora_linear_infer.default, (x, weight, bias, A, B, scale, transposed))
    y, s, words = ops.lora_linear(*plain)
    for needs_x, needs_a, needs_b in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            ops.lora_linear_backward.default,
            (
                torch.ones_like(y), x if needs_a else None, weight, A, B, s if needs_b else None,
                words if p else None, scale, p, transposed, needs_x,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("lead", [(), (0,), (17,)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_on_other_ranks_of_x(lead, p):
    torch.library.opcheck(ops.lora_linear.default, arguments(lead, p=p))


def by_formula(args, dtype, dy):
    """Y and all gradients, every operation as written, with the mask that belongs to the seed."""
    x, w, b, A, B, scale, p, seed, transposed = args
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b, A, B) if t is not None]
    x, w, *b, A, B = leaves
    mask = 1.0
    if p:
        words = reference_bits(x.numel() // x.shape[-1], x.shape[-1], p, seed.item())
        mask = bits.unpack_bits(words, x.shape[-1], dtype).view(x.shape) / (1 - p)
    y = torch.nn.functional.linear(x, w.t() if transposed else w, *b)
    y = y + (x * mask) @ A.t() @ B.t() * scale
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@cases
def test_the_mask_is_the_seed_s(dtype, low, bias, transposed, p):
    """Y and all gradients beside the float64 formula with the mask that belongs to the seed."""
    args = arguments((2, 3), dtype, low, bias, transposed, p)
    wanted = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    y, _, _ = ops.lora_linear(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = [y, *torch.autograd.grad(y, wanted, dy)]

    exact, plain = (by_formula(args, d, dy) for d in (torch.float64, dtype))
    for got, like in zip(ours, [y, *wanted], strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape
    assert_as_good_as_torch(*(dict(enumerate(f)) for f in (ours, plain, exact)))
    if p:
        other = torch.tensor([6])
        assert not torch.equal(y, ops.lora_linear(*detached(args[:7]), other, transposed)[0])


@pytest.mark.parametrize(
    "frozen", [set(), {0}, {3}, {4}, {0, 3}, {0, 4}, {3, 4}, {1, 2, 3, 4}, {0, 1, 2}], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_subset_of_the_arguments_may_need_a_gradient(frozen, p):
    """The same bits as with all of them; what needs none gets none and is not kept."""
    args = arguments(p=p)
    every = ops.lora_linear(*args)[0]
    dy = torch.randn_like(every)
    want = dict(enumerate(torch.autograd.grad(every, args[:5], dy)))
    fewer = [
        a.detach().requires_grad_(i not in frozen) if isinstance(a, Tensor) and i < 5 else a
        for i, a in enumerate(args)
    ]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, s, words = ops.lora_linear(*fewer)
    assert not s.requires_grad and not words.requires_grad
    left = [i for i in range(5) if i not in frozen]
    for i, got in zip(left, torch.autograd.grad(y, [fewer[i] for i in left], dy), strict=True):
        assert torch.equal(got, want[i])
    assert any(t.shape == (6, 3) for t in kept) == (4 not in frozen)
    assert any(t.shape == (2, 3, 40) for t in kept) == bool({1, 3} - frozen)


def test_where_no_kernel_runs_torch_makes_the_same_mask(monkeypatch):
    """A CPU outside the interpreter."""
    args = arguments(dtype=torch.bfloat16, p=0.3)
    y, _, words = ops.lora_linear(*args)
    for file in (triton_backend, masks):
        monkeypatch.setattr(file, "INTERPRET", SimpleNamespace(value=False))
    monkeypatch.setattr(masks, "dropout_bits", None)
    other, s, same = ops.lora_linear(*args)
    assert torch.equal(words, same) and s.dtype == torch.float32
    exact = by_formula(args, torch.float64, torch.ones_like(y))[0]
    assert_as_good_as_torch(other.detach(), y.detach(), exact, average=True)
    torch.library.opcheck(ops.lora_linear.default, args)


def test_nothing_is_written_to_and_two_passes_agree_bit_for_bit():
    args = arguments(p=0.3)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    passes = []
    for _ in range(2):
        y, _, _ = ops.lora_linear(*args)
        dy = torch.ones_like(y)
        for _ in range(2):
            passes.append((y, *torch.autograd.grad(y, args[:5], dy, retain_graph=True)))
    for again in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(passes[0], again, strict=True))
    assert torch.equal(dy, torch.ones_like(dy))
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_bad_arguments_are_refused():
    good = detached(arguments(p=0.3))

    def given(i, value):
        return [*good[:i], value, *good[i + 1 :]]

    for args, says in (
        (given(0, torch.ones(2, 7)), r"x has shape \[2, 7\]; allowed: \[2, 40\]"),
        (given(2, torch.ones(5)), r"bias has shape \[5\]; allowed: \[24\]"),
        (given(3, torch.ones(3, 7)), r"A has shape \[3, 7\]"),
        (given(4, torch.ones(24, 4)), r"B has shape \[24, 4\]; allowed: \[24, 3\]"),
        (given(0, torch.ones(2, 40).half()), "x torch.float16, weight torch.float32"),
        (given(4, torch.ones(24, 3).half()), "B torch.float16"),
        (given(6, 1.0), "p is 1.0; allowed: 0 <= p < 1"),
        (given(7, None), r"seed is None; allowed with p > 0: torch.int64 \[1\]"),
        (given(7, torch.zeros(2)), r"seed is torch.float32 \[2\]"),
        (given(8, True), r"allowed.*weight \[K, N\] of \[24, 40\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            ops.lora_linear(*args)
    x, weight, bias, A, B, scale, *_ = arguments()
    y = ops.lora_linear_infer(x, weight, bias, A, B, scale, False)
    with pytest.raises(RuntimeError, match="lora_linear_infer has no gradient"):
        y.sum().backward()
