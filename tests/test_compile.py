"""``torch.compile`` on the torch backend, which traces the plain formula, and its operators.

The operators of torch.library on the kernels are in tests/kernels/test_library.py.
"""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftkern
from peftkern.kernels.reference import reference_bits
from peftkern.ops import library, torch_backend
from peftkern.ops.bits import unpack_bits
from peftkern.ops.lora import lora_linear, plain
from peftkern.ops.projection import Projection
from peftkern.tuners.lora import group
from tests.changes import CHANGES, K, layer_of, layer_pair
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.graphs import Graphs, unwrapped
from tests.tiny import gradients, inputs, pair

ops = torch.ops.peftkern


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(dtype=torch.float64, low=None, bias=True, transposed=False, p=0.0, lead=(2, 3)):
    """Arguments of ``lora_linear``: x, weight, bias, A, B, scale, p, seed, transposed."""
    g = torch.Generator().manual_seed(0)
    K, N, r = 40, 24, 3

    def leaf(*shape, dtype=dtype):
        drawn = torch.randn(*shape, generator=g) / shape[-1] ** 0.5
        return drawn.to(dtype).requires_grad_()

    weight = leaf(*((K, N) if transposed else (N, K)))
    A, B = leaf(r, K, dtype=low or dtype), leaf(N, r, dtype=low or dtype)
    seed = torch.tensor([2**40 + 5]) if p else None
    return leaf(*lead, K), weight, leaf(N) if bias else None, A, B, 0.7, p, seed, transposed


def doubled(leaf):
    return leaf.detach().double().requires_grad_()


def numbers(y, leaves, dy):
    """y and the gradients of the leaves, by numbers for names."""
    return dict(enumerate([y.detach(), *torch.autograd.grad(y, leaves, dy)]))


@pytest.mark.parametrize(
    ("dtype", "low", "bias", "transposed", "p"),
    [
        (torch.float32, None, True, False, 0.3),
        (torch.float32, None, False, True, 0.0),
        (torch.bfloat16, torch.float32, True, True, 0.3),
        (torch.float64, None, True, False, 0.3),
    ],
    ids=str,
)
def test_operators(dtype, low, bias, transposed, p):
    """opcheck, the mask of the seed, and every gradient beside the plain formula's."""
    args = arguments(dtype, low, bias, transposed, p)
    x, weight, bias, A, B, scale, _, seed, _ = args
    with peftkern.use_backend("torch"):
        torch.library.opcheck(ops.lora_linear.default, args)
        y, _, words = ops.lora_linear(*args)
        mask = None
        if p:
            assert torch.equal(words, reference_bits(6, 40, p, seed.item()))
            mask = unpack_bits(words, 40, dtype).view(x.shape)
        want = plain(x, Projection(weight, bias, A, B, scale, p, transposed), mask)
        leaves = [t for t in (x, weight, bias, A, B) if t is not None]
        dy = torch.randn_like(y)
        found = [numbers(t, leaves, dy) for t in (y, want)]
        if dtype == torch.float64:
            assert_same_number(*found)
        else:
            wide = [None if t is None else doubled(t) for t in (x, weight, bias, A, B)]
            mask = None if mask is None else mask.double()
            exact = plain(wide[0], Projection(*wide[1:], scale, p, transposed), mask)
            leaves = [t for t in wide if t is not None]
            assert_as_good_as_torch(*found, numbers(exact, leaves, dy.double()))
        fixed = [t.detach() if isinstance(t, Tensor) else t for t in args]
        torch.library.opcheck(ops.lora_linear_infer.default, (*fixed[:6], transposed))
        _, s, words = ops.lora_linear(*fixed)
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            x, weight, _, A, B = fixed[:5]
            torch.library.opcheck(
                ops.lora_linear_backward.default,
                (
                    dy, x if needs[1] else None, weight, A, B, s if needs[2] else None,
                    words if p else None, scale, p, transposed, needs[0],
                ),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_one_graph_without_operators(family, monkeypatch):
    """The graph has dropout, which drops the same elements as eager calls.

    Neither a second step nor a change of eager calls' groups compiles anything.
    """
    model, _ = pair(family, lora_dropout=0.3, dtype=torch.float64)
    model.base_model.model.loss_type = "ForCausalLM"
    batch, graphs = inputs(family), Graphs()
    loss, want = gradients(model.train(), batch)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for i in range(2):
        monkeypatch.setattr(group, "_breaks", group._breaks + i)
        got_loss, got = gradients(compiled, batch)
        assert_same_number(got_loss, loss)
        assert_same_number(unwrapped(got), want)
    assert graphs == [{}]
    assert all("torch's own products" in row.compiled for row in peftkern.explain(model))


@pytest.mark.parametrize(
    "change", ["in_place", "scaling", "other_active", "disabled", "patched_forward", "dropout_p"]
)
def test_what_is_changed_after_compiling_is_seen(change):
    model, _ = layer_pair(dropout=0.3, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, K, dtype=torch.float64)

    def both():
        out = []
        for call in (compiled, model):
            torch.manual_seed(0)
            out.append(call(x).detach())
        assert_same_number(*out)
        return out[1]

    before = both()
    CHANGES[change](layer_of(model))
    assert differ(before, both())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor(monkeypatch):
    # what it has compiled for one instruction set it would run on another, with other numbers
    capability = torch.backends.cpu.get_cpu_capability()
    folder = Path(tempfile.gettempdir()) / f"inductor-{getpass.getuser()}-{capability}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    model, _ = layer_pair("conv1d", dtype=torch.float64)
    x = torch.randn(4, 5, K, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (torch.compile(model, fullgraph=True), model):
        y = call(x)
        found.append(
            [y, *torch.autograd.grad(y.square().sum(), (x, layer_of(model).lora_A.default.weight))]
        )
    assert_same_number(*found)


# ---------------------------------------------------------------- the eager operation


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_x_for_two_projections_and_passes_that_agree_bit_for_bit(p):
    """The gradient of x is the sum; the same graph run twice gives the same bits."""
    x, weight, bias, A, B, scale, *_ = arguments(p=p)

    def run(count):
        torch.manual_seed(0)
        return [lora_linear(x, weight, bias, A, B, scale, p) for _ in range(count)]

    first, second = run(2)
    leaves = (x, weight, bias, A, B)
    dys = torch.randn_like(first), torch.randn_like(second)
    both = [torch.autograd.grad((first, second), leaves, dys, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    first, second = run(2)
    alone = [torch.autograd.grad(y, leaves, dy) for y, dy in ((first, dys[0]), (second, dys[1]))]
    for together, *parts in zip(both[0], *alone, strict=True):
        assert_same_number(together, sum(parts))


def test_words_that_are_given_are_the_mask():
    """And the generator is left alone."""
    x, weight, bias, A, B, scale, p, seed, _ = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments(p=0.3, lead=(6,))
    )
    words = torch_backend.draw(6, 40, p, seed)
    state = torch.get_rng_state()
    member = Projection(weight, bias, A, B, scale, p, False)
    [(y, _, kept)] = torch_backend.forward(x, [member], [words])
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(kept, words)
    mask = unpack_bits(words, 40, torch.float64)
    assert_same_number(y, plain(x, member, mask))


def test_eager_calls_do_not_go_through_the_operators(monkeypatch):
    monkeypatch.setattr(library, "_ops", None)
    model, _ = layer_pair(dropout=0.3)
    model(torch.randn(3, K)).sum().backward()
