"""Batches with an adapter name for each row, on the torch backend.

Tested are the names that each layer gets, and the reason of a layer that cannot run the batch as
one operation. ``tests/kernels`` has the kernels, ``test_peft_model`` the comparison with HF PEFT.
"""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops.lora_mixed import Adapter, SampleIndex, lora_mixed
from peftkern.tuners.lora.linear import Linear
from peftkern.tuners.lora.row_adapters import AdapterNames, mixed_call, mixed_reason
from peftkern.utils.handing import HERE, hand_over, handing
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import fill, first, inputs, make

CPU = torch.device("cpu")
NAMES = ("b", "__base__", "a", "b")


def model_of(family="llama", task="CAUSAL_LM", **settings):
    """Adapters ``default`` (rank 4), ``a`` (2) and ``b`` (9) on a tiny model."""
    config = peftkern.LoraConfig(task_type=task, r=4, lora_alpha=8, **settings)
    model = peftkern.get_peft_model(make(family, task, torch.float64), config)
    for name, r in (("a", 2), ("b", 9)):
        model.add_adapter(name, peftkern.LoraConfig(task_type=task, r=r, lora_alpha=r, **settings))
    fill(model)
    return model.eval()


def layer_of(base=None, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = Linear((nn.Linear(12, 10) if base is None else base).to(dtype))
    for name, r in (("a", 2), ("b", 9)):
        config = peftkern.LoraConfig(r=r, target_modules=["x"], init_lora_weights=False, **settings)
        layer.update_layer(name, r, r, config)
    layer.set_adapter(["a"])
    return layer.eval()


def one_by_one(layer, x, names):
    """Each row through its adapter, by the layer's own parts."""
    rows = []
    for row, name in zip(x, names, strict=True):
        y = layer.base_layer(row)
        rows.append(y if name == "__base__" else y + layer._update(name, row).to(y.dtype))
    return torch.stack(rows)


# ---------------------------------------------------------------- who gets which names


@torch.no_grad()
def test_eight_threads_on_one_model_do_not_mix():
    """All of them stand in the same decoder layer at once, half with names and half without."""
    model = model_of()
    batch = {"input_ids": inputs("llama", batch=3)["input_ids"]}
    choices = [["a", "b", "__base__"], ["b", "b", "a"], ["__base__", "a", "default"], None] * 2
    choices[6] = ["default", "__base__", "b"]
    want = [first(model(**batch, adapter_names=c)) for c in choices]
    meet = threading.Barrier(len(choices), timeout=60)
    blocks = [m for n, m in model.named_modules() if n.endswith("layers.1")]
    handle = blocks[0].register_forward_pre_hook(lambda *_: (meet.wait(), None)[1])
    got, failed = [None] * len(choices), []

    def run(i):
        try:
            with torch.no_grad():
                for _ in range(3):
                    got[i] = first(model(**batch, adapter_names=choices[i]))
        except BaseException as e:
            failed.append(e)
            meet.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not failed
    for mine, alone in zip(got, want, strict=True):
        assert_same_number(mine, alone)
    assert (want[0] - want[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_model_called_inside_gets_names_of_its_own_or_none():
    outer, inner = model_of(), model_of("gpt2", fan_in_fan_out=True)
    ids = inputs("llama", batch=4)["input_ids"]
    want_outer = first(outer(ids, adapter_names=NAMES))
    want_inner, want_named = first(inner(ids)), first(inner(ids, adapter_names=["b"] * 4))
    seen = []

    def call_inner(*_):
        seen.append(first(inner(ids)))
        seen.append(first(inner(ids, adapter_names=["b"] * 4)))
        seen.append(first(inner(ids)))

    norm = outer.base_model.model.model.norm
    handle = norm.register_forward_pre_hook(call_inner)
    assert torch.equal(first(outer(ids, adapter_names=NAMES)), want_outer)
    handle.remove()
    for got, want in zip(seen, (want_inner, want_named, want_inner), strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_nothing_is_left_after_an_exception_and_hooks_are_not_touched():
    model = model_of()
    ids = inputs("llama", batch=4)["input_ids"]
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    want = first(model(ids))

    def stop(*_):
        assert HERE.blocks and not any(m._forward_pre_hooks for m in layers)
        raise KeyboardInterrupt

    handle = model.base_model.model.model.norm.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids, adapter_names=NAMES)
    handle.remove()
    assert HERE.blocks == () and torch.equal(first(model(ids)), want)
    with pytest.raises(ValueError, match="4 and 3"):
        model(ids[:3], adapter_names=NAMES)
    assert HERE.blocks == ()


@torch.no_grad()
def test_a_base_layer_called_inside_is_the_base_layer():
    model = model_of()
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    x, seen = torch.randn(2, 16, dtype=torch.float64), []
    ids = inputs("llama", batch=4)["input_ids"]
    norm = model.base_model.model.model.norm
    handle = norm.register_forward_pre_hook(lambda *_: seen.append(layer.base_layer(x)))
    model(ids, adapter_names=NAMES)
    handle.remove()
    assert torch.equal(seen[0], layer.base_layer(x))


def test_blocks_may_end_in_any_order_and_names_of_the_call_hold():
    layers = nn.Linear(1, 1), nn.Linear(1, 1)
    one, two = handing({layers[0]: ["x"]}), handing({layers[0]: ["y"], layers[1]: ["z"]})
    one.__enter__()
    two.__enter__()
    assert hand_over(layers[0], {"k": 1}) == {"k": 1, "adapter_names": ["y"]}
    assert hand_over(layers[0], {"adapter_names": ["own"]}) == {"adapter_names": ["own"]}
    one.__exit__(None, None, None)
    assert hand_over(layers[1], {}) == {"adapter_names": ["z"]}
    two.__exit__(None, None, None)
    assert HERE.blocks == () and hand_over(layers[1], {}) == {}


@torch.no_grad()
def test_layers_that_come_and_go_between_forwards():
    model = model_of()
    ids = inputs("llama", batch=4)["input_ids"]
    config = peftkern.LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False)
    before = first(model(ids, adapter_names=NAMES))
    model.add_adapter("c", config)  # layers that no adapter had
    assert_same_number(first(model(ids, adapter_names=NAMES)), before)
    mixed = first(model(ids, adapter_names=["c", *NAMES[1:]]))
    model.set_adapter("c")
    assert_same_number(mixed[:1], first(model(ids[:1])))
    assert (mixed[:1] - before[:1]).abs().max() > 1e-2


@pytest.mark.long
@torch.no_grad()
def test_compiled_by_torch():
    """One graph, made anew for other names and for none, in whatever thread."""
    model, ids = model_of(), inputs("llama", batch=4)["input_ids"]
    choices = (None, NAMES, ["a"] * 4, None, NAMES)
    want = [first(model(ids, adapter_names=c)) for c in choices]
    inner = model.base_model.model.model
    torch._dynamo.reset()
    inner.forward = torch.compile(inner.forward, backend="eager", fullgraph=True)
    for names, plain in zip(choices, want, strict=True):
        got = first(model(ids, adapter_names=names))
        assert_same_number(got, plain)
        with ThreadPoolExecutor() as another, torch.no_grad():
            there = another.submit(torch.no_grad()(model), ids, adapter_names=names).result()
        assert torch.equal(first(there), got)


# ---------------------------------------------------------------- the names as an object


def test_names_are_a_sequence_with_an_index():
    names = AdapterNames(["b", "__base__", "a", "b"])
    assert names == NAMES and names.index("a") == 2 and list(names[:2]) == ["b", "__base__"]
    assert names.order == ("b", "a") and names.samples.choice == (0, -1, 1, 0)
    index = names.samples.on(CPU)
    assert index.dtype == torch.int32 and index.tolist() == [0, -1, 1, 0]
    assert names.samples.on(CPU) is index and AdapterNames.of(names) is names
    rows = names.samples.rows(CPU)
    assert [r.tolist() for r in rows] == [[0, 3], [2]] and names.samples.rows(CPU) is rows
    for other in (pickle.loads(pickle.dumps(names)), copy.deepcopy(names)):
        assert other == names and other.order == names.order
    assert AdapterNames(["__base__"]).order == () and len(AdapterNames([]).samples) == 0


def test_names_used_in_inference_mode_can_train_later():
    model, batch = model_of(), inputs("llama", batch=4)
    names = AdapterNames(NAMES)
    with torch.inference_mode():
        first(model(**batch, adapter_names=names))
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    found = []
    for given in (names, NAMES):
        model.zero_grad()
        model(**batch, adapter_names=given).loss.backward()
        grads = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        assert any(".b." in n for n in grads)
        found.append({n: grad.clone() for n, grad in grads.items()})
    assert_same_number(*found)
    index = SampleIndex(names.samples.choice, 2)
    with torch.inference_mode():
        kept = [index.on(CPU), *index.rows(CPU)]
    assert not any(t.is_inference() for t in kept)


def test_an_index_out_of_range_is_refused():
    for choice, adapters in (([0, 2], 2), ([0, -2], 2), ([0], 0)):
        with pytest.raises(ValueError, match=rf"index\[\d\] is {choice[-1]}; allowed: -1 .base"):
            SampleIndex(choice, adapters)


# ---------------------------------------------------------------- the operation


def operands(dtype=torch.float32, transposed=False):
    g = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    weight = some(6, 5) if transposed else some(5, 6)
    return some(4, 3, 6), weight, some(5), [(some(r, 6), some(5, r), 0.5 + r) for r in (2, 7)]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operation_and_its_gradients(transposed):
    x, weight, bias, adapters = operands(torch.float64, transposed)
    index = SampleIndex([1, -1, 0, 1], 3)
    with_none = [*adapters, None]
    y = lora_mixed(x, weight, bias, with_none, index, transposed)
    want = x @ (weight if transposed else weight.T) + bias
    for b, i in enumerate(index.choice):
        if i >= 0:
            A, B, scale = adapters[i]
            want[b] += scale * (x[b] @ A.T @ B.T)
    assert_same_number(y, want)
    inputs = [x, weight, bias, *(t for a in adapters for t in a[:2])]
    for t in inputs:
        t.requires_grad_()

    def run(x, weight, bias, A0, B0, A1, B1):
        found = [Adapter(A0, B0, 2.5), (A1, B1, 7.5), None]
        return lora_mixed(x, weight, bias, found, index, transposed)

    assert torch.autograd.gradcheck(run, inputs)


def test_no_adapter_is_the_base_product():
    x, weight, bias, adapters = operands()
    base = nn.functional.linear(x, weight, bias)
    assert torch.equal(lora_mixed(x, weight, bias, [None], SampleIndex([0] * 4, 1)), base)
    assert torch.equal(lora_mixed(x, weight, bias, adapters, SampleIndex([-1] * 4, 2)), base)


def test_wrong_counts_are_named():
    x, weight, bias, adapters = operands()
    with pytest.raises(ValueError, match=r"index has 3 entries; allowed: .* \(4, 3, 6\)"):
        lora_mixed(x, weight, bias, adapters, SampleIndex([0] * 3, 2))
    with pytest.raises(ValueError, match="adapters has 2 entries; allowed: 3"):
        lora_mixed(x, weight, bias, adapters, SampleIndex([0] * 4, 3))
    with pytest.raises(ValueError, match="index has 6 entries"):
        lora_mixed(x[0, 0], weight, bias, adapters, SampleIndex([0] * 6, 2))


# ---------------------------------------------------------------- layers


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(layer):
    layer.base_layer.register_forward_hook(lambda m, a, out: out + 1)


def hooked_a(layer):
    layer.lora_A["b"].register_forward_hook(lambda m, a, out: out * 3)


def biased(layer):
    layer.lora_B["b"].bias = nn.Parameter(torch.ones(10, dtype=torch.float64))


def wider(layer):
    layer.lora_A["b"].double(), layer.lora_B["b"].double()


def drops(layer):
    layer.lora_dropout["b"] = nn.Dropout(0.5)
    layer.lora_dropout["b"].eval().register_forward_hook(lambda m, a, out: out * 2)


def other_weight(layer):
    class Shard(nn.Parameter):
        pass

    layer.base_layer.weight = Shard(layer.base_layer.weight.data)


SLOW = {
    "base layer Special computes": lambda: layer_of(Special(12, 10)),
    "base layer has hooks": hooked,
    "lora_A of b has hooks": hooked_a,
    "lora_bias of b": biased,
    "dtypes: base torch.float32, lora_A of b torch.float64": wider,
    "lora_dropout of b has hooks": drops,
    "weight of base layer is a Shard": other_weight,
}


@pytest.mark.parametrize("reason", list(SLOW))
@torch.no_grad()
def test_a_layer_that_cannot_be_one_operation_says_why_and_is_right(reason, caplog):
    make_slow = SLOW[reason]
    dtype = torch.float32 if make_slow is wider else torch.float64
    layer = make_slow() if make_slow.__name__ == "<lambda>" else layer_of(dtype=dtype)
    if make_slow.__name__ != "<lambda>":
        make_slow(layer)
    caplog.set_level("INFO", logger="peftkern")
    x = torch.randn(4, 3, 12, dtype=dtype)
    names = AdapterNames(NAMES)
    assert mixed_call(layer, x, names) is None and reason in mixed_reason(layer, x, names)
    for _ in range(2):
        y = layer(x, adapter_names=list(NAMES))
    plain = one_by_one(layer, x, NAMES)
    if dtype == torch.float64:
        assert_same_number(y, plain)
    else:
        exact = one_by_one(copy.deepcopy(layer).double(), x.double(), NAMES)
        assert_as_good_as_torch({0: y}, {0: plain}, {0: exact})
    assert caplog.text.count(reason) == 1 and "adapter by adapter" in caplog.text


@torch.no_grad()
def test_a_plain_layer_is_one_operation_for_2_and_3_dimensions(caplog):
    caplog.set_level("INFO", logger="peftkern")
    layer = layer_of()
    for shape in ((4, 12), (4, 3, 12), (4, 2, 3, 12), (4, 0, 12)):
        x = torch.randn(*shape, dtype=torch.float64)
        y = layer(x, adapter_names=list(NAMES))
        assert_same_number(y, one_by_one(layer, x, NAMES))
    assert "adapter by adapter" not in caplog.text
    layer.enable_adapters(False)
    assert torch.equal(layer(x, adapter_names=list(NAMES)), layer.base_layer(x))


def test_dropout_of_a_layer_in_training_mode_drops(caplog):
    caplog.set_level("INFO", logger="peftkern")
    layer = layer_of(lora_dropout=0.5).train()
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    a, b = (layer(x, adapter_names=list(NAMES)) for _ in range(2))
    assert not torch.equal(a, b) and torch.equal(a[1], b[1]) and "dropout of b" in caplog.text


def test_merged_adapters_are_refused_as_by_hf_peft():
    layer = layer_of()
    layer.merged_adapters.append("a")
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged"):
        layer(torch.ones(4, 12, dtype=torch.float64), adapter_names=list(NAMES))
