"""lora_experts under torch.compile: one graph with operators, their fakes, masks and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.ops.experts import grouped, loop, ways
from peftkern.ops.experts.double import plain_rows
from peftkern.ops.experts.dropout import adapter_of_rows, words_of_seed
from peftkern.ops.experts.order import sort_pairs
from peftkern.ops.experts_library import _call_of
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.graphs import Graphs
from tests.mixtures import E, Mixture, formula, mixture, numbers

ops = torch.ops.peftkern
RANKS = {"one": ((3,), (2,)), "two": ((3, 1), (2, 4)), "none": ((), ()), "up": ((3,), ())}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(m: Mixture, **kwargs) -> Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice, **kwargs)


def operator_arguments(ranks="two", p=0.0, mixed=False, bias=True, gather=True, **kwargs):
    """Arguments of ``experts_linear`` for a mixture's up."""
    m = mixture(ranks=RANKS[ranks], p=p, mixed=mixed, bias=bias, **kwargs)
    tensors = [m.x, m.up.weight, *([m.up.bias] if bias else [])]
    tensors += [t for f in m.up.factors for t in (f.A, f.B)]
    settings = [float(bias), *(v for f in m.up.factors for v in (f.scale, f.p))]
    if not gather:
        rows = m.x.detach().repeat_interleave(m.index.shape[1], 0)
        tensors[0] = rows.requires_grad_()
    seed = torch.tensor([2**40 + 3]) if p else None
    return tensors, m.index, m.choice, seed, settings, gather, False


@pytest.mark.parametrize(
    ("ranks", "p", "mixed", "gather"),
    [
        ("one", 0.3, False, True),
        ("two", 0.3, True, True),
        ("two", 0.0, False, False),
        ("none", 0.0, False, True),
    ],
)
def test_operators(ranks, p, mixed, gather):
    args = operator_arguments(ranks, p, mixed, gather=gather)
    torch.library.opcheck(ops.experts_linear.default, args)
    tensors, chosen, choice, seed, settings, _, sentinels = args
    own = _call_of(tensors, chosen, choice, settings, sentinels)
    pairs, _ = sort_pairs(chosen, E, choice, own.adapters)
    words = words_of_seed(own.up, len(pairs), adapter_of_rows(own, pairs), seed)
    leaves = [t for t in tensors if t.requires_grad]

    def found(y: Tensor):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        second = torch.autograd.grad(total, leaves)
        return [y.detach(), *(grad.detach() for grad in first), *second]

    y, _ = ops.experts_linear(*args)
    plain = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    exact = plain_rows(own, pairs, words, gather)
    assert_same_number(plain, torch.autograd.grad(exact.square().sum(), leaves, retain_graph=True))
    assert_same_number(found(y), found(exact))


@pytest.mark.parametrize("gate", ["halves", "alone", "function"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-norm-transposed"])
def test_one_graph_with_the_eager_numbers(gate, extras):
    m = mixture(gate, ranks=RANKS["two"], bias=extras, norm=extras, transposed=extras)
    graphs = Graphs()
    compiled = torch.compile(call, backend=graphs, fullgraph=True)
    assert_same_number(numbers(compiled, m), numbers(formula, m))
    assert len(graphs) == 1
    with torch.no_grad():
        assert_same_number(compiled(m), formula(m))


@pytest.mark.parametrize("mixed", [False, True])
def test_sentinels_and_choices(mixed):
    m = mixture(ranks=RANKS["two"], bias=True, mixed=mixed)
    m.index[1, 0], m.index[3] = E, E + 5
    compiled = torch.compile(lambda m: call(m, sentinels=True), backend="aot_eager", fullgraph=True)
    assert_same_number(numbers(compiled, m), numbers(formula, m))


@pytest.mark.slow
def test_by_inductor():
    m = mixture("function", dtype=torch.float32, sizes=(40, 24, 40, 24, 6, 3))
    compiled = torch.compile(call, fullgraph=True)
    assert_as_good_as_torch(
        numbers(compiled, m), numbers(formula, m), numbers(formula, m.to(torch.float64))
    )


def test_dropout_draws_anew_and_the_same_for_a_seed():
    m = mixture(p=0.5)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    first = numbers(compiled, m)
    assert differ(numbers(compiled, m)["y"], first["y"])
    torch.manual_seed(5)
    assert_same_number(numbers(compiled, m), first)


def test_other_routings_and_lengths_do_not_compile_again():
    graphs = Graphs()
    compiled = torch.compile(call, backend=graphs, fullgraph=True, dynamic=True)
    for tokens in (7, 9, 12):
        m = mixture(sizes=(tokens, 6, 10, 5, 4, 2))
        assert_same_number(numbers(compiled, m), numbers(formula, m))
    assert len(graphs) == 1


def test_a_traced_call_routes_other_tokens():
    m = mixture(bias=True)
    for leaf in m.leaves:  # they become constants of the trace
        leaf.requires_grad_(False)

    def run(x: Tensor, index: Tensor) -> Tensor:
        return call(m._replace(x=x, index=index))

    with torch.no_grad():
        traced = torch.jit.trace(run, (m.x, m.index), check_trace=False)
        other = (m.index + 1) % E
        assert_same_number(traced(m.x * 2, other), formula(m._replace(x=m.x * 2, index=other)))


def test_an_index_out_of_range_is_an_error():
    m = mixture()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="allowed: 0 to 3, for 4 experts"):
        compiled(m._replace(index=m.index + 3))


def test_the_operator_on_grouped_products(monkeypatch):
    args = operator_arguments("two", 0.3, True, dtype=torch.float32, sizes=(37, 16, 24, 32, 5, 3))
    tensors = args[0]
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        y, s = ops.experts_linear(*args)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)], s.shape

    def way(name, module):
        choice = ways.Choice(module, name, "a test")
        monkeypatch.setattr("peftkern.ops.experts_library.of_torch", lambda call: choice)

    way("grouped", grouped)
    ours, columns = run()
    torch.library.opcheck(ops.experts_linear.default, args)
    way("loop", loop)
    torchs, same = run()
    assert columns == same
    wide = operator_arguments("two", 0.3, True, dtype=torch.float32, sizes=(37, 16, 24, 32, 5, 3))
    wide = ([t.detach().double().requires_grad_(t.requires_grad) for t in wide[0]], *wide[1:])
    y, _ = ops.experts_linear(*wide)
    exact = torch.autograd.grad(y.square().sum(), [t for t in wide[0] if t.requires_grad])
    assert_as_good_as_torch(
        dict(enumerate(ours)), dict(enumerate(torchs)), dict(enumerate([y.detach(), *exact]))
    )
