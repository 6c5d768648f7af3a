"""Layers and models on the kernels, compiled to graphs of operators, compared with eager calls."""

import copy

import pytest
import torch

import peftkern
from peftkern.ops import library
from peftkern.tuners.lora.mlp import release_blocks
from tests.changes import CHANGES, K, layer_of, layer_pair
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.graphs import Graphs, JointGraphs, unwrapped
from tests.needs import needs
from tests.tiny import gradients, inputs, make, pair

TRAINED, INFERRED, PLAIN = {"lora_linear": 1}, {"lora_linear_infer": 1}, {}


@pytest.fixture(autouse=True)
def on_triton():
    torch._dynamo.reset()
    with peftkern.use_backend("triton"):
        yield
    torch._dynamo.reset()


def step(model, x, seed=0):
    """Y, the gradients of x and of all that trains, and Y without a graph."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        torch.manual_seed(seed)
        return {"y": y.detach(), "x": x.grad, "again": model(x), **unwrapped(grads)}


def assert_same(got, want):
    """The same operations in the same order, compiled or not."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def ungrouped(model):
    """The linears one by one, each with a seed of its own, as in compiled graphs."""
    release_blocks(model, everywhere=True)
    for module in model.modules():
        if (group := module.__dict__.get("_group")) is not None:
            group.off = True
    return model


def one_block(family, **lora):
    """A tiny model of one block, every linear layer adapted."""
    base = make(family)
    blocks = base.model.layers if family == "llama" else base.transformer.h
    del blocks[1:]
    base.config.num_hidden_layers = 1
    return pair(family, base=base, target_modules="all-linear", **lora)[0]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "p", "compiler"),
    [
        pytest.param("llama", 0.0, "eager", marks=pytest.mark.slow),
        ("llama", 0.3, "aot_eager"),
        pytest.param("gpt2", 0.3, "eager", marks=pytest.mark.slow),
        ("gpt2", 0.0, "aot_eager"),
    ],
)
def test_a_model_is_one_graph_with_one_operator_a_layer(family, p, compiler):
    """Logits, loss and gradients equal those of eager calls, with the same dropout masks.

    On a CPU both take the seeds from one generator in the order of the calls.
    """
    model = one_block(family, lora_dropout=p)
    ungrouped(model)
    model.base_model.model.loss_type = "ForCausalLM"  # GPT2's own name for it is logged, a break
    batch, layers = inputs(family), len(peftkern.explain(model))
    want_loss, want = gradients(model.train(), batch)
    graphs = Graphs() if compiler == "eager" else JointGraphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(2):  # nothing that a step leaves behind makes another graph
        loss, got = gradients(compiled, batch)
    assert torch.equal(loss, want_loss)
    assert_same(unwrapped(got), want)
    if compiler == "eager":
        assert graphs == [{"lora_linear": layers}]
    else:
        assert graphs.forward == [{"lora_linear": layers}]
        assert graphs.backward == [{"lora_linear_backward": layers}]
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)
    made = graphs if compiler == "eager" else graphs.forward
    assert made[1:] == [{"lora_linear_infer": layers}]


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpointed_block_draws_the_same_mask_again(reentrant):
    """Checkpointing is within the compiled model, or around compiled blocks.

    In the first case, forward operators are in the backward's graph.
    """
    model = ungrouped(one_block("llama", lora_dropout=0.3))
    batch, layers = inputs("llama"), len(peftkern.explain(model))
    model.config.use_cache = False
    want_loss, want = gradients(model.train(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for block in model.base_model.model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    loss, got = gradients(model, batch)
    assert torch.equal(loss, want_loss)
    assert_same(got, want)
    for block in model.base_model.model.model.layers:
        block._compiled_call_impl = None
    model.disable_input_require_grads()  # its in-place flag is not for compiled graphs
    graphs = JointGraphs()
    loss, got = gradients(torch.compile(model, backend=graphs, fullgraph=True), batch)
    assert torch.equal(loss, want_loss)
    assert_same(unwrapped(got), want)
    assert graphs.forward == [{"lora_linear": layers}]
    assert graphs.backward == [{"lora_linear": layers, "lora_linear_backward": layers}]


def compiled_layer(**settings):
    model, _ = layer_pair(**settings)
    graphs = Graphs()
    return model, torch.compile(model, backend=graphs, fullgraph=True), graphs


@pytest.mark.parametrize(
    ("change", "then"),
    [
        # what is in the same place is not even compiled again
        *[(change, []) for change in ("base_data", "in_place", "new_parameter", "swap_a")],
        *[
            (change, [TRAINED, INFERRED])
            for change in ("scaling", "other_active", "other_rank", "no_more_bias", "frozen")
        ],
        *[(change, [TRAINED, TRAINED]) for change in ("dropout_p", "swap_dropouts")],
        *[
            (change, [PLAIN, PLAIN])
            for change in (
                "b_bias", "dropout_other", "dropout_patched", "dropout_all", "patched_a",
                "patched_forward", "subclass", "parametrised", "offloaded", "disabled",
                "both_active", "double",
            )
        ],
    ],
)  # fmt: skip
def test_what_is_changed_after_compiling_is_seen(change, then):
    """One graph with gradients and one without before the change; ``then`` is what it adds."""
    drops = "drop" in change
    model, compiled, graphs = compiled_layer(dropout=0.3 if drops else 0.0)
    x = torch.randn(2, 5, K)
    assert_same(step(compiled, x), step(model, x))
    assert graphs == [TRAINED, TRAINED if drops else INFERRED]
    CHANGES[change](layer_of(model))
    x = x.to(layer_of(model).base_layer.weight.dtype)
    same = assert_same_number if change == "double" else assert_same  # the kernels hand it to torch
    same(step(compiled, x), step(model, x))
    if change == "frozen":
        needs("torch>=2.13", "before, the graph of before serves frozen weights too")
    assert graphs[2:] == then


def test_hooks_of_before_are_called():
    for change in ("base_hook", "a_hook", "b_pre_hook", "dropout_hook"):
        torch._dynamo.reset()
        model, compiled, graphs = compiled_layer()
        CHANGES[change](layer_of(model))
        x = torch.randn(3, K)
        assert_same(step(compiled, x), step(model, x))
        assert graphs == [PLAIN, PLAIN], change


@pytest.mark.long
def test_the_adapter_the_backend_and_disabling_may_go_back_and_forth():
    model, compiled, graphs = compiled_layer(dropout=0.3)
    x = torch.randn(2, 5, K)
    for _ in range(2):  # the second time all graphs are there
        assert_same(step(compiled, x), step(model, x))
        with model.disable_adapter():
            assert_same(step(compiled, x), step(model, x))
        model.set_adapter("other")
        assert_same(step(compiled, x), step(model, x))
        model.set_adapter("default")
        assert graphs == [TRAINED, TRAINED, PLAIN, PLAIN, TRAINED, TRAINED]
    with peftkern.use_backend("torch"):  # a graph of torch's products beside one operation
        exact = step(copy.deepcopy(model).double(), x.double())
        assert_as_good_as_torch(step(compiled, x), step(model, x), exact)
    assert graphs[6:] == [PLAIN, PLAIN]
    assert_same(step(compiled, x), step(model, x))
    assert len(graphs) == 8


def test_the_first_operation_of_a_process_may_be_a_compiled_one(monkeypatch):
    from peftkern.ops import backend

    model, compiled, graphs = compiled_layer()
    monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
    # nothing forced, nothing chosen; not reloaded, as others hold its functions
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.delitem(vars(backend), "active")
    for _ in range(3):
        compiled(torch.randn(3, K))
    assert graphs == [TRAINED]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic"])
def test_one_graph_for_every_batch_size(kind, how):
    model, _ = layer_pair(kind, dropout=0.3)
    graphs = JointGraphs()
    dynamic = True if how == "dynamic" else None
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=dynamic)
    for rows in (2, 3, 7, 40):
        x = torch.randn(rows, 5, K)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        found = []
        for call in (compiled, model):
            torch.manual_seed(1)
            y = call(x)
            found.append(
                [
                    y,
                    *torch.autograd.grad(
                        y.square().sum(), layer_of(model).lora_A["default"].weight
                    ),
                ]
            )
        assert all(map(torch.equal, *found))
    assert graphs.forward == [TRAINED] and graphs.backward == [{"lora_linear_backward": 1}]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_part_of_the_graph(dtype):
    """On, off and with inputs of other dtypes; gradients have the dtypes of eager calls."""
    model, _ = layer_pair(dropout=0.3, dtype=dtype)
    graphs = JointGraphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    x = torch.randn(2, 5, K).to(dtype)
    for given in (x, x.float(), x.half()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = step(compiled, given), step(model, given)
        assert got["y"].dtype == torch.bfloat16
        assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in want.items()}
        assert_same(got, want)
    got, want = step(compiled, x), step(model, x)
    assert got["y"].dtype == dtype
    assert_same(got, want)
    assert all(graph == TRAINED for graph in graphs.forward)


def test_derivatives_within_and_of_the_graph():
    """torch.func keeps to the plain formula; second derivatives come from it as in eager calls."""
    model, compiled, graphs = compiled_layer()

    def gradient(x):
        return torch.func.grad(lambda z: model(z).square().sum())(x)

    x = torch.randn(2, 5, K)
    inside = Graphs()
    assert torch.equal(torch.compile(gradient, backend=inside, fullgraph=True)(x), gradient(x))
    assert inside == [PLAIN]
    x.requires_grad_()
    found = []
    for call in (compiled, model):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        A = layer_of(model).lora_A["default"].weight
        found.append(torch.autograd.grad(dx.square().sum(), (x, A)))
    assert graphs == [TRAINED]
    assert all(map(torch.equal, *found))


@pytest.mark.slow
def test_inductor_compiles_the_graph_around_the_operators():
    """The result is linear in x for one seed, so forward and backward have the same mask.

    Inductor has a random generator of its own, and seeds differ from call to call. The tensors hold
    whole numbers, so that all sums are exact.
    """
    model, _ = layer_pair(dropout=0.5)
    g = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=g).float()

    for parameter in model.parameters():
        parameter.data = whole(*parameter.shape)
    compiled = torch.compile(model, fullgraph=True)
    x, change = whole(4, 5, K).requires_grad_(), whole(4, 5, K)

    def seeded(x):
        torch.manual_seed(0)
        return compiled(x)

    y = seeded(x)
    v = whole(*y.shape)
    (dx,) = torch.autograd.grad((y * v).sum(), x)
    moved = seeded((x.detach() + change).requires_grad_())
    assert ((moved - y) * v).sum() == (dx * change).sum() != 0
    assert not torch.equal(compiled(x), compiled(x))
    A, found = layer_of(model).lora_A["default"].weight, []
    for call in (torch.compile(model.eval(), fullgraph=True), model):
        y = call(x)
        found.append((y, *torch.autograd.grad(y.sum(), (x, A))))
    assert all(map(torch.equal, *found))


def test_eager_layers_do_not_come_here(monkeypatch):
    """They cost less on the host."""
    model, _ = layer_pair(dropout=0.3)
    monkeypatch.setattr(library, "_ops", None)
    step(model, torch.randn(3, K))


def test_explain_says_what_a_compiler_gets():
    model, _ = layer_pair()
    assert peftkern.explain(model)[0].compiled == "one operator"
    assert str(peftkern.explain(model)).endswith("under torch.compile: 1 one operator")
    layer_of(model).double()
    assert "float64" in peftkern.explain(model)[0].compiled
    with peftkern.use_backend("torch"):
        assert "torch's own products" in peftkern.explain(model)[0].compiled
    CHANGES["b_bias"](layer_of(model))
    assert peftkern.explain(model)[0].compiled == "plain formula"
