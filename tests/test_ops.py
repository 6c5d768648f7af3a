"""The operation against float64 in any shape, rank, dtype and stride; gradients; kept tensors."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import peftkern
from peftkern import lora_linear
from peftkern.ops import torch_backend
from peftkern.ops.backend import describe
from peftkern.ops.bits import pack_bits, unpack_bits, words_per_row
from tests import children
from tests.closeness import assert_as_good_as_torch, assert_same_number

# no deadline: the first call of a dtype is slow; derandomized: the same examples in every run
relaxed = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def draw(*shape, g, dtype=torch.float64):
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def case(M, K, N, r, seed, dtype=torch.float64, low=None, bias=True, transposed=False):
    """x, weight, bias, A, B of an op's call; values on the grid of ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    x = draw(*(M if isinstance(M, tuple) else (M,)), K, g=g, dtype=dtype)
    w = draw(*((K, N) if transposed else (N, K)), g=g, dtype=dtype)
    b = draw(N, g=g, dtype=dtype) if bias else None
    return x, w, b, draw(r, K, g=g, dtype=low or dtype), draw(N, r, g=g, dtype=low or dtype)


def formula(x, w, b, A, B, scale, mask=None, p=0.0, transposed=False):
    """The definition, in the arguments' dtype."""
    dropped = x if mask is None else x * mask / (1 - p)
    return F.linear(x, w.t() if transposed else w, b) + scale * F.linear(F.linear(dropped, A), B)


def mask_of(shape, p, dtype, seed):
    """The elements that torch's own dropout keeps after this seed."""
    torch.manual_seed(seed)
    return (F.dropout(torch.ones(shape, dtype=dtype), p) != 0).double()


def assert_rounded(got, exact, sizes, dtype, terms):
    """Assert that the error is within the bound for any order of sums.

    In float64 the results are the same number. Else the bound is 8 roundings to ``dtype`` and
    ``terms`` roundings to float32, times ``sizes``, the sums of the terms' absolute values.
    """
    if dtype == torch.float64:
        assert_same_number(got, exact)
        return
    step, sums = (torch.finfo(d).eps / 2 for d in (dtype, torch.float32))
    off, allowed = (got.double() - exact).abs(), (8 * step + terms * sums) * sizes
    smallest = torch.finfo(dtype).smallest_normal * 8 * step
    assert (off <= allowed + smallest).all(), (off - allowed).max()


sizes = st.sampled_from([1, 2, 3, 5, 8, 17, 31, 32, 33, 40, 41, 63, 64, 65, 96])
ranks = st.integers(1, 64)
dtypes = st.sampled_from(
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
        (torch.float64, None),
    ]
)


@relaxed
@given(
    M=st.sampled_from([0, 1, 2, 7, 33, 40, (2, 3), (1, 1, 1), (2, 0), (3, 1, 5), ()]),
    K=sizes,
    N=sizes,
    r=ranks,
    dt=dtypes,
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_follow_the_formula(M, K, N, r, dt, p, bias, transposed, seed):
    """Any shape, with the mask that torch's dropout draws; errors are measured against float64."""
    dtype, low = dt
    M = M if isinstance(M, tuple) else (M,)
    args = [
        t.requires_grad_() if t is not None else None
        for t in case(M, K, N, r, seed, dtype, low, bias, transposed)
    ]
    x, w, b, A, B = args
    mask = mask_of(x.shape, p, low or dtype, seed) if p else None
    torch.manual_seed(seed)
    y = lora_linear(x, w, b, A, B, 0.7, p, transposed)
    dy = draw(*y.shape, g=torch.Generator().manual_seed(seed), dtype=dtype)
    y.backward(dy)

    def by_formula(of):
        """Y and the gradients, of the numbers or of their sizes."""
        wide = [of(t.detach().double()).requires_grad_() if t is not None else None for t in args]
        out = formula(*wide, 0.7, mask, p, transposed)
        out.backward(of(dy.double()))
        return [out.detach(), *(None if t is None else t.grad for t in wide)]

    found = [y.detach(), *(None if t is None else t.grad for t in args)]
    exact, sizes = by_formula(lambda t: t.clone()), by_formula(torch.abs)
    terms = 4 + x[..., :1].numel() + K + N + r
    assert y.dtype == dtype and y.shape == (*M, N) == exact[0].shape
    for got, like, right, size in zip(found, [y, *args], exact, sizes, strict=True):
        assert (got is None) == (like is None)
        if got is not None:
            assert got.shape == like.shape and got.dtype == like.dtype
            assert_rounded(got, right, size, dtype, terms)
    if p == 0:  # inference goes another way
        with torch.no_grad():
            y = lora_linear(x, w, b, A, B, 0.7, 0.0, transposed)
            assert_rounded(y, exact[0], sizes[0], dtype, terms)


@relaxed
@given(K=sizes, N=sizes, r=st.integers(1, 16), seed=st.integers(0, 99), data=st.data())
def test_strides_do_not_matter(K, N, r, seed, data):
    """Transposed, expanded, sliced and offset tensors give what their contiguous copies give."""
    x, w, b, A, B = case((4, 6), K, N, r, seed)
    views = {
        "x": [x, x.transpose(0, 1), x[:, :1].expand(4, 6, K), x[::2, 1::2], x.flip(0), x[1]],
        "w": [w, w.t().contiguous().t(), torch.cat([w, w])[N:], torch.cat([w, w], 1)[:, K:]],
        "A": [A, A.t().contiguous().t(), torch.cat([A, A], 1)[:, :K]],
        "B": [B, B.t().contiguous().t(), torch.cat([B, B], 1)[:, r:]],
    }
    chosen = {k: data.draw(st.sampled_from(range(len(v))), label=k) for k, v in views.items()}
    x, w, A, B = (views[k][i].detach().requires_grad_() for k, i in chosen.items())
    dy = torch.ones(1, dtype=torch.float64).expand(*x.shape[:-1], N)  # what .sum() sends back
    results = []
    for args in (
        (x, w, b, A, B),
        [t.detach().contiguous().requires_grad_() for t in (x, w, b, A, B)],
    ):
        y = lora_linear(*args, 1.5)
        results.append([y, *torch.autograd.grad(y, [args[i] for i in (0, 1, 3, 4)], dy)])
        with torch.no_grad():
            assert_same_number(lora_linear(*args, 1.5), y)
    assert_same_number(*results)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2, 4), (1, 2, 3, 4)], ids=str)
def test_gradcheck_and_second_derivatives(p, transposed, frozen):
    """Numerical first and second derivatives, for every set of inputs that need them."""
    args = case(2, 5, 3, 2, 0, transposed=transposed)
    for i, t in enumerate(args):
        t.requires_grad_(i not in frozen)

    def run(*tensors):
        torch.manual_seed(4)  # one mask for all evaluations
        return lora_linear(*tensors, 0.6, p, transposed)

    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_second_derivative_with_frozen_A_is_right_or_refused():
    """S alone is kept then, and S has no graph: an error is better than a wrong number."""
    x, w, b, A, B = case(2, 5, 3, 2, 0)
    x.requires_grad_(), B.requires_grad_()
    y = lora_linear(x, w, b, A, B, 0.6)
    try:
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    except RuntimeError as error:
        assert "second derivative" in str(error)
    else:
        (got,) = torch.autograd.grad(gx.square().sum(), B)
        (gx,) = torch.autograd.grad(
            formula(x, w, b, A, B, 0.6).square().sum(), x, create_graph=True
        )
        assert_same_number(got, torch.autograd.grad(gx.square().sum(), B)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("trained", [(0,), (3, 4), ()], ids=str)
def test_selective_checkpoints_keep_the_base_product(trained, p, bias):
    """It is not written to; also where nothing is trained (infer)."""
    x, w, b, A, B = case(3, 6, 5, 2, 0, bias=bias)
    for i, t in enumerate((x, w, b, A, B)):
        if i in trained:
            t.requires_grad_()
    kept = torch.ops.aten.addmm.default if bias else torch.ops.aten.mm.default
    products = []

    def policy(ctx, op, *args, **kwargs):
        if op is kept and args[-2].shape == x.shape and args[-1].shape == (6, 5):
            products.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def step(x):
        y = lora_linear(x, w, b, A, B, 0.6, p)
        return y if trained else y * scale

    def run(checkpointed):
        torch.manual_seed(3)
        if not checkpointed:
            return step(x)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(step, x, use_reentrant=False, context_fn=contexts)

    scale = torch.ones(5, dtype=x.dtype, requires_grad=True)
    leaves = [(x, w, b, A, B)[i] for i in trained] or [scale]
    dy = torch.linspace(-1, 1, 15, dtype=x.dtype).view(3, 5)
    found = [
        [y := run(checkpointed), *torch.autograd.grad(y, leaves, dy)]
        for checkpointed in (False, True)
    ]
    assert_same_number(*found)
    assert products.count(False) == 1  # versions of torch differ in asking again


def kept_for_backward(call):
    """The tensors that autograd keeps for the graph of ``call()``."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    assert y.requires_grad
    return kept


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "low"), [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str
)
def test_keeps_x_s_and_bits_only(dtype, low, p):
    """Beyond its arguments: S [M, r] and one bit per element of x. No dropped X, no byte mask."""
    M, K, N, r = 64, 200, 48, 6
    x, w, b, A, B = case((4, M // 4), K, N, r, 0, dtype, low)
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    kept = kept_for_backward(lambda: lora_linear(x, w, b, A, B, 1.0, p))
    own = {t.untyped_storage().data_ptr() for t in (x, w, b, A, B)}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    s = [t for t in extra if tuple(t.shape) == (M, r)]
    bits = [t for t in extra if t.dtype == torch.int32]
    assert len(s) == 1 and len(bits) == (1 if p else 0) and len(extra) == len(s) + len(bits)
    if p:
        assert tuple(bits[0].shape) == (M, words_per_row(K))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in extra}
    assert sum(held.values()) == s[0].numel() * s[0].element_size() + (
        M * words_per_row(K) * 4 if p else 0
    )


def test_keeps_nothing_that_no_gradient_needs():
    x, w, b, A, B = case(64, 32, 48, 4, 0)
    x.requires_grad_()  # everything frozen: neither x nor S
    shapes = [tuple(t.shape) for t in kept_for_backward(lambda: lora_linear(x, w, b, A, B, 1.0))]
    assert (64, 32) not in shapes and (64, 4) not in shapes
    A.requires_grad_()
    shapes = [tuple(t.shape) for t in kept_for_backward(lambda: lora_linear(x, w, b, A, B, 1.0))]
    assert (64, 32) in shapes and (64, 4) not in shapes
    assert not lora_linear(x.detach(), w, b, A.detach(), B, 1.0).requires_grad


def test_inputs_are_never_written_to():
    args = case(40, 64, 48, 4, 0, torch.float32)
    before = [t.clone() for t in args]
    for t in (args[0], args[3], args[4]):
        t.requires_grad_()
    y = lora_linear(*args, 1.0, 0.3)
    dy = torch.randn_like(y)
    sent = dy.clone()
    y.backward(dy, retain_graph=True)
    first = args[3].grad.clone()
    y.backward(dy)  # the same graph once more: what was kept is whole
    assert torch.equal(args[3].grad, 2 * first)
    assert torch.equal(dy, sent) and all(
        torch.equal(a, b) for a, b in zip(args, before, strict=True)
    )


@relaxed
@given(rows=st.integers(0, 9), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_bits_hold_the_mask(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    words = pack_bits(mask)
    assert words.dtype == torch.int32 and words.shape == (rows, words_per_row(columns))
    assert torch.equal(unpack_bits(words, columns, torch.float32), mask.float())
    for m, k in mask.nonzero().tolist()[:5]:  # the layout, which the kernels share
        assert words[m, k // 32].item() >> (k % 32) & 1


@pytest.mark.parametrize(
    ("dtype", "wide", "autocast"),
    [
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, False),
        (torch.float16, True, False),
        (torch.float16, False, False),
        (torch.float32, True, True),
        (torch.bfloat16, True, True),
    ],
    ids=str,
)
def test_errors_against_float64_are_at_most_pefts(dtype, wide, autocast):
    """Y, dX, dA, dB of one linear, each of eight draws together."""

    def results(model, x, dy, on):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            y = model(x)
        y.backward(dy.to(y.dtype))
        layer = model.base_model.model[0]
        return y, x.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad

    found = []
    for seed in range(8):
        M, K, N, r = ((48, 96, 64, 8), (7, 64, 128, 5))[seed % 2]
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(K, N)).to(dtype)
        config = {"r": r, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False}
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**config), autocast_adapter_dtype=wide
        )
        ours = peftkern.get_peft_model(
            base, peftkern.LoraConfig(**config), autocast_adapter_dtype=wide
        )
        ours.load_state_dict(theirs.state_dict())
        x, dy = (
            torch.randn(M, K).to(dtype),
            torch.randn(M, N).to(torch.bfloat16 if autocast else dtype),
        )
        exact = results(copy.deepcopy(theirs).double(), x.double(), dy.double(), False)
        found.append([results(m, x, dy, autocast) for m in (ours, theirs)] + [exact])
    for draws in zip(*(zip(*f, strict=True) for f in found), strict=True):  # of Y, of dX, ...
        assert_as_good_as_torch(*(dict(enumerate(t)) for t in zip(*draws, strict=True)))


def test_both_ways_of_dropping_draw_and_scale_alike():
    """One is for CUDA, where torch has a kernel for all of it; on a CPU both draw the same."""
    x = torch.randn(7, 40, dtype=torch.float64)
    found = []
    for drop in (torch_backend._drop, torch_backend._drop_fused):
        torch.manual_seed(5)
        dropped, keep, factor = drop(x, 0.3)
        found.append((dropped * factor, keep))
    assert_same_number(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1]) and 0 < keep.sum() < x.numel()


def test_backend_is_chosen_in_one_place(monkeypatch):
    for name in ("auto", "torch"):
        with peftkern.use_backend(name):
            assert describe()[0] == "torch"
            lora_linear(*case(2, 3, 4, 1, 0), 1.0)
    with peftkern.use_backend("torch"):
        assert "PEFTKERN_BACKEND=torch" in describe()[1]
    with pytest.raises(ValueError, match=r"abacus.*auto, torch"), peftkern.use_backend("abacus"):
        raise AssertionError("the block must not run")
    lora_linear(*case(2, 3, 4, 1, 0), 1.0)  # as before
    for name in ("torch", "TORCH", ""):
        monkeypatch.setenv("PEFTKERN_BACKEND", name)
        assert describe()[0] == "torch"
    monkeypatch.setenv("PEFTKERN_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"PEFTKERN_BACKEND='abacus'.*auto, torch"):
        describe()
    code = (
        "import torch, peftkern; x = torch.ones(2, 2); peftkern.lora_linear(x, x, None, x, x, 1.0)"
    )
    done = children.python("-c", code)
    assert done.returncode == 1 and "PEFTKERN_BACKEND='abacus'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_wrong_shapes_are_refused(which):
    args = list(case(3, 8, 5, 2, 0))
    args[which] = args[which][..., :-1]
    for grad in (False, True):
        args[3].requires_grad_(grad) if args[3].is_leaf else None
        with pytest.raises(RuntimeError):
            lora_linear(*args, 1.0)
