"""Mixed batches one after the other: what a thread and a layer keep between them goes unnoticed."""

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.checkpoint.hotswap import hotswap_adapter_from_state_dict
from peftkern.ops import mixed_direct, scratch
from peftkern.ops.lora_mixed import Adapter, SampleIndex, lora_mixed
from peftkern.ops.scratch import Scratch
from peftkern.tuners.lora.row_adapters import AdapterNames, mixed_call
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_mixed import NAMES, layer_of, one_by_one
from tests.test_mixed_products import formula, many


@pytest.fixture(params=["direct", "copies"], autouse=True)
def way(request, monkeypatch):
    """Products that read factors where they lie, where torch has them, and those on copies."""
    if request.param == "copies":
        monkeypatch.setattr(mixed_direct, "_why_not", lambda *call: "the test asks for copies")


# of samples in order and apart, of adapters alike, padded, and of several ranks
BATCHES = {
    "in order": (list(range(8)), [8] * 8),
    "two ranks": ([5, 0, 3, 2, -1, 1, 4, 0], [2, 64, 2, 64, 2, 64]),
    "padded": ([2, 0, 1], [3, 4, 5]),
    "one": ([0, -1, 0], [4]),
    "gathered": ([0, -1, 1, -1, 2], [4] * 3),
    "ranks apart": ([1, 0, 3, 2, 5, 4, 7, 6], [4, 448] * 4),
    "large": ([0, 1, 2, 0, 1], [256, 250, 240]),
}


def check(choice, ranks, T=300, K=24, N=20, dtype=torch.float64):
    x, weight, bias, adapters = many(choice, ranks, T, K, N, dtype)
    y = lora_mixed(x, weight, bias, adapters, SampleIndex(choice, len(ranks)))
    want = formula(*(t.double() for t in (x, weight, bias)), [
        Adapter(A.double(), B.double(), s) for A, B, s in adapters], choice)  # fmt: skip
    if dtype is torch.float64:
        assert_same_number(y, want)
    else:
        plain = formula(x, weight, bias, adapters, choice)
        assert_as_good_as_torch({0: y}, {0: plain}, {0: want})
    return y


@pytest.fixture
def empty():
    """The thread's buffers, none at first."""
    held = scratch._kept.buffers
    held.clear()
    yield held
    held.clear()


# ---------------------------------------------------------------- the memory of a thread


@torch.no_grad()
def test_one_buffer_grows_and_serves_all_batches(empty):
    check(*BATCHES["padded"], T=1, K=8, N=8)
    small = empty[torch.float64].count
    for batch in BATCHES.values():
        check(*batch)
    (buffer,) = empty.values()
    assert buffer.count > small
    for batch in BATCHES.values():
        check(*batch)
        check(*batch, T=2)
    assert empty == {torch.float64: buffer}


@torch.no_grad()
def test_results_do_not_lie_in_the_buffer(empty):
    kept = {name: check(*batch) for name, batch in BATCHES.items()}
    copies = {name: y.clone() for name, y in kept.items()}
    for batch in BATCHES.values():
        check(*batch, T=250)
    for buffer in empty.values():
        buffer.memory.fill_(torch.nan)
    assert all(torch.equal(kept[name], copies[name]) for name in BATCHES)


@pytest.mark.parametrize("batch", list(BATCHES))
@torch.no_grad()
def test_values_left_in_the_buffer_are_not_read(batch, empty):
    for garbage in (torch.nan, torch.inf):
        check(*BATCHES["two ranks"], T=400)
        for buffer in empty.values():
            buffer.memory.fill_(garbage)
        check(*BATCHES[batch])


@torch.no_grad()
def test_each_dtype_has_its_buffer(empty):
    for dtype in (torch.float64, torch.float32, torch.float64, torch.float32):
        for batch in BATCHES.values():
            check(*batch, dtype=dtype)
    assert set(empty) == {torch.float32, torch.float64}


def test_inference_mode_then_none_then_gradients(empty):
    for batch in BATCHES.values():
        with torch.inference_mode():
            check(*batch)
        with torch.no_grad():
            check(*batch)
    with torch.inference_mode():
        check(*BATCHES["two ranks"])
    assert not any(buffer.memory.is_inference() for buffer in empty.values())
    x, weight, bias, adapters = many(*BATCHES["two ranks"], 300)
    A = adapters[1].A.requires_grad_()
    index = SampleIndex(BATCHES["two ranks"][0], 6)
    y = lora_mixed(x, weight, bias, adapters, index)
    with torch.no_grad():
        check(*BATCHES["two ranks"], T=400)
    (grad,) = torch.autograd.grad(y.sin().sum(), A)
    want = formula(x, weight, bias, adapters, index.choice)
    assert_same_number(grad, torch.autograd.grad(want.sin().sum(), A)[0])


@torch.no_grad()
def test_a_call_that_fails_leaves_the_next_one_right(empty):
    for batch in BATCHES.values():
        choice, ranks = batch
        check(*batch)
        x, weight, bias, adapters = many(choice, ranks, 300)
        adapters = [Adapter(a.A, a.B[:-1], a.scale) for a in adapters]
        with pytest.raises(RuntimeError):
            lora_mixed(x, weight, bias, adapters, SampleIndex(choice, len(ranks)))
        check(*batch)


@torch.no_grad()
def test_threads_have_buffers_of_their_own():
    batches, failed = list(BATCHES.values()) * 2, []
    meet = threading.Barrier(len(batches), timeout=60)

    def run(batch, T):
        try:
            with torch.no_grad():
                for _ in range(20):
                    meet.wait()
                    check(*batch, T=T)
        except BaseException as e:
            failed.append(e)
            meet.abort()

    threads = [threading.Thread(target=run, args=(b, 200 + i)) for i, b in enumerate(batches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_call_within_a_call_gets_other_memory(empty):
    like = torch.ones(1)
    outer = Scratch(like, 24)
    first = outer.take(1, 2, 6)
    inner = Scratch(like, 24)
    other = inner.take(2, 3, 4)
    first.fill_(1)
    other.fill_(2)
    second = outer.take(1, 2, 6).fill_(3)
    assert first.eq(1).all() and other.eq(2).all() and second.eq(3).all()
    inner.give_back()
    outer.give_back()
    again = Scratch(like, 24)
    assert again.take(1, 2, 6).data_ptr() == first.data_ptr()


def test_where_torch_makes_the_tensors():
    def none(like, count=4):
        return Scratch(like, count).take(1, 1, 4) is None

    like = torch.ones(1)
    assert none(None) and none(torch.ones(1, device="meta")) and none(nn.Parameter(like))
    assert none(like, scratch.LIMIT // 4 + 1) and not none(like)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        assert none(like)


@torch.no_grad()
def test_without_gradients_under_vmap():
    x, weight, bias, adapters = many([0, 1], [2, 2], 3)
    index, scales = SampleIndex([0, 1], 2), torch.tensor([1.0, -2.0], dtype=x.dtype)

    def run(scale):
        return lora_mixed(x, weight, bias, [Adapter(a.A * scale, *a[1:]) for a in adapters], index)

    want = torch.stack([run(scale) for scale in scales])
    assert_same_number(torch.func.vmap(run)(scales), want)


# ---------------------------------------------------------------- hooks that a layer looked for


def same(layer, x):
    """Whether a mixed batch is one operation, after a check of its numbers."""
    assert_same_number(layer(x, adapter_names=list(NAMES)), one_by_one(layer, x, NAMES))
    return mixed_call(layer, x, AdapterNames(NAMES)) is not None


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@torch.no_grad()
def test_hooks_and_forwards_after_a_mixed_batch_are_seen(part):
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    assert same(layer, x) and layer._held is not None
    module = getattr(layer, part)["b"]
    handle = module.register_forward_hook(lambda m, args, out: out * 3)
    assert not same(layer, x)
    handle.remove()
    assert same(layer, x)
    module.forward = lambda x, old=module.forward: old(x) * 2
    assert not same(layer, x)
    del module.forward
    assert same(layer, x)
    other = copy.deepcopy(module)
    other._forward_hooks[0] = lambda m, args, out: out * 3  # without torch's counter
    getattr(layer, part)["b"] = other
    assert not same(layer, x)


@torch.no_grad()
def test_new_weights_after_a_mixed_batch_are_taken():
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    assert same(layer, x)
    a, b = layer.lora_A["b"].weight, layer.lora_B["b"].weight
    a.mul_(2)
    assert same(layer, x)
    a.data, b.data = torch.randn_like(a[:4]), torch.randn_like(b[:, :4])  # another rank
    assert same(layer, x)
    layer.lora_A["b"].weight = nn.Parameter(torch.randn_like(a))
    assert same(layer, x)
    layer.scaling["b"] = 7.0
    assert same(layer, x)
    layer.scaling["b"] = torch.tensor(7.0, dtype=torch.float64)
    assert not same(layer, x)


@pytest.mark.parametrize("batch", [NAMES, ("b", "b", "b", "b")], ids=["all", "few of many"])
@torch.no_grad()
def test_modules_that_come_and_go_after_a_mixed_batch(batch):
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    config = peftkern.LoraConfig(r=3, target_modules=["x"], init_lora_weights=False)
    for name in ("c", "d"):
        layer.update_layer(name, 3, 3, config)
    layer.eval()
    names = AdapterNames(batch)

    def changed():
        """True when the output is another one than at the last call, and the right one."""
        nonlocal last
        before, last = last, layer(x, adapter_names=names)
        assert_same_number(last, one_by_one(layer, x, batch))
        return not torch.equal(before, last)

    last = layer(x, adapter_names=names)
    assert not changed() and layer._held is not None
    for part, shape in (("lora_A", (12, 9)), ("lora_B", (9, 10))):
        store = getattr(layer, part)
        store["b"] = nn.Linear(*shape, bias=False, dtype=torch.float64)
        assert changed() and not changed()
    layer.lora_dropout["b"] = nn.Dropout(0.5).eval()
    assert not changed()
    layer.lora_dropout["b"] = nn.Hardtanh()
    assert mixed_call(layer, x, names) is None
    layer.lora_dropout["b"] = nn.Identity()
    layer.update_layer("e", 3, 3, config)
    layer.eval()
    assert not changed()
    layer.delete_adapter("b")
    last = layer(x, adapter_names=names)
    assert torch.equal(last[0], layer.base_layer(x)[0])


@torch.no_grad()
def test_an_adapter_swapped_between_two_mixed_batches():
    config = peftkern.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    small = peftkern.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    base = nn.Sequential(nn.Linear(12, 10)).double()
    model = peftkern.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    model.add_adapter("other", small)
    model.eval()
    layer, x = model.base_model.model[0], torch.randn(4, 3, 12, dtype=torch.float64)
    names = AdapterNames(NAMES)
    for _ in range(3):
        before = layer(x, adapter_names=names)
    state = {
        f"base_model.model.0.{part}.b.weight": getattr(layer, part)["other"].weight.clone()
        for part in ("lora_A", "lora_B")
    }
    hotswap_adapter_from_state_dict(model, state, "b", small)
    want = layer(x, adapter_names=["other" if n == "b" else n for n in NAMES])
    after = layer(x, adapter_names=names)
    assert_same_number(after, want)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])


@torch.no_grad()
def test_a_copy_looks_for_its_own_hooks():
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    assert same(layer, x)
    twin = copy.deepcopy(layer)
    assert twin._held is None and same(twin, x)
    twin.lora_B["b"].forward = lambda x: torch.zeros(*x.shape[:-1], 10, dtype=x.dtype)
    assert same(layer, x) and not same(twin, x)


@torch.no_grad()
def test_a_deleted_adapter_is_freed():
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    assert same(layer, x)
    gone = weakref.ref(layer.lora_A["b"])
    layer.delete_adapter("b")
    gc.collect()
    assert gone() is None
    config = peftkern.LoraConfig(r=3, target_modules=["x"], init_lora_weights=False)
    layer.update_layer("b", 3, 3, config)
    assert same(layer.eval(), x)


@torch.no_grad()
def test_a_deleted_adapter_of_a_fused_layer_is_freed():
    base = nn.Sequential(nn.Linear(12, 10))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    peftkern.fuse(model.double().eval())
    layer = model.base_model.model[0]
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    layer(x, adapter_names=list(NAMES))
    assert layer._held is not None
    gone = weakref.ref(layer.lora_A["b"])
    model.delete_adapter("b")
    gc.collect()
    assert gone() is None
    layer(x, adapter_names=["a"] * 4)
    peftkern.unfuse(model)
    assert "_held" not in layer.__dict__
