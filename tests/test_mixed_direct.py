"""A mixed batch on products that read each factor where it lies: edits, and what they decline."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peftkern.ops import lora_mixed as lora_mixed_module
from peftkern.ops import mixed_direct, notes
from peftkern.ops.lora_mixed import Adapter, SampleIndex, lora_mixed
from peftkern.tuners.lora.row_adapters import AdapterNames
from peftkern.utils import private
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_mixed import NAMES, layer_of, one_by_one
from tests.test_mixed_products import formula, many

pytestmark = pytest.mark.skipif(
    not private.mkl_batches(), reason="no products by address in this torch"
)
CHOICE, RANKS = [1, 1, -1, 0, 2, 2, 2, 1, 3], [3, 5, 3, 1, 4]  # the last one has no sample


@pytest.fixture
def alone(monkeypatch):
    """No other way is there."""

    class None_:
        def mixed(self, *call):
            raise AssertionError("a batch that was to be direct is not")

    monkeypatch.setattr(lora_mixed_module, "torch_backend", other := None_())
    monkeypatch.setattr(lora_mixed_module._backend, "active", other)


@pytest.mark.parametrize("T", [1, 2, 17])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_numbers(alone, T, transposed):
    x, weight, bias, adapters = many(CHOICE, RANKS, T)
    index = SampleIndex(CHOICE, len(RANKS))
    w = weight.T.contiguous() if transposed else weight
    adapters[3] = None
    want = formula(x, weight, bias, adapters, CHOICE)
    for _ in range(3):
        assert_same_number(lora_mixed(x, w, bias, adapters, index, transposed), want)
    assert_same_number(lora_mixed(x, w, None, adapters, index, transposed), want - bias)
    apart = torch.stack([x, x], -1)[..., 0]
    assert_same_number(lora_mixed(apart, w, bias, adapters, index, transposed), want)
    with torch.inference_mode():
        assert_same_number(lora_mixed(x, w, bias, adapters, index, transposed), want)


@pytest.mark.parametrize(
    "rule", [lambda *sides: True, lambda *sides: False, lambda rows, r: rows > 5]
)
@torch.no_grad()
def test_numbers_in_both_orders_of_s(alone, monkeypatch, rule):
    monkeypatch.setattr(mixed_direct, "_by_rows", rule)
    x, weight, bias, adapters = many(CHOICE, RANKS, 3)
    want = formula(x, weight, bias, adapters, CHOICE)
    index = SampleIndex(CHOICE, len(RANKS))
    assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)


def test_the_side_that_fills_vectors_is_stored_side_by_side():
    by_rows = {(rows, r) for rows in (1, 8, 15, 16, 24, 31) for r in (4, 8, 16)
               if mixed_direct._by_rows(rows, r)}  # fmt: skip
    assert by_rows == {(8, 4), (16, 4), (16, 8), (24, 4), (24, 8)}


@torch.no_grad()
def test_with_another_default_device():
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    names, want = AdapterNames(NAMES), one_by_one(layer, x, NAMES)
    with torch.device("meta"):
        for _ in range(2):
            assert_same_number(layer(x, adapter_names=names), want)


@torch.no_grad()
def test_float32(alone):
    x, weight, bias, adapters = many(CHOICE, RANKS, 5, 96, 80, torch.float32)
    wide = [Adapter(a.A.double(), a.B.double(), a.scale) for a in adapters]
    want = formula(x.double(), weight.double(), bias.double(), wide, CHOICE)
    y = lora_mixed(x, weight, bias, adapters, SampleIndex(CHOICE, len(RANKS)))
    plain = formula(x, weight, bias, adapters, CHOICE)
    assert_as_good_as_torch({0: y}, {0: plain}, {0: want})


@pytest.mark.parametrize("guards", [True, False])
@torch.no_grad()
def test_every_edit_is_seen(monkeypatch, guards):
    if not guards:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    names = AdapterNames(NAMES)
    A, B = (lambda: layer.lora_A["b"].weight), (lambda: layer.lora_B["b"].weight)
    a, b = A().data, B().data

    def to(first, second):
        A().data, B().data = first, second

    edits = [
        lambda: A().mul_(2),
        lambda: A().data.mul_(3),
        lambda: b.add_(1),
        lambda: to(a[:4], b[:, :4].contiguous()),  # A has the same address, with half of the rank
        lambda: to(a[:4], b[:, :4]),
        lambda: to(a, b),
        lambda: to(a.view(12, 9).t(), b),  # the same address and size, in another order
        lambda: to(a.clone(), b),
        lambda: A().requires_grad_(False),
        lambda: setattr(layer.lora_A["b"], "weight", nn.Parameter(torch.randn_like(a))),
        lambda: layer.scaling.update(b=5.0),
        lambda: A().data.zero_(),
        lambda: to(a, b),
    ]
    for _ in range(3):
        for edit in (lambda: None, lambda: None, *edits):
            edit()
            assert_same_number(layer(x, adapter_names=names), one_by_one(layer, x, NAMES))


@torch.no_grad()
def test_a_factor_that_stands_twice(alone):
    x, weight, bias, adapters = many(CHOICE, RANKS, 4)
    adapters[2] = Adapter(adapters[0].A, adapters[0].B, 0.5)
    index = SampleIndex(CHOICE, len(RANKS))
    want = formula(x, weight, bias, adapters, CHOICE)
    for _ in range(4):
        assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)


@torch.no_grad()
def test_a_factor_without_memory_is_torchs_error():
    x, weight, bias, adapters = many(CHOICE, RANKS, 4)
    index = SampleIndex(CHOICE, len(RANKS))
    for _ in range(3):
        lora_mixed(x, weight, bias, adapters, index)
    adapters[1].A.untyped_storage().resize_(0)
    factors = mixed_direct.Factors.of(adapters)
    runs = index.batches.runs(x, 20, factors)
    assert runs.output(x.view(-1, 24), weight, bias, factors) is None


class Special(torch.Tensor):
    pass


REASONS = {
    "a factor is not contiguous": lambda x, w, b, found: (
        x, w, b, [Adapter(a.A.t().contiguous().t(), *a[1:]) for a in found]),
    "dtype is not the activations'": lambda x, w, b, found: (
        x.float(), w.float(), b.float(), found),
    "no products by address in this torch, for torch.bfloat16": lambda x, w, b, found: (
        x.bfloat16(), w.bfloat16(), b.bfloat16(), found),
    "not a plain tensor on a CPU": lambda x, w, b, found: (
        x, w, b, [Adapter(a.A.as_subclass(Special), *a[1:]) for a in found]),
}  # fmt: skip


@pytest.mark.parametrize("reason", list(REASONS))
@torch.no_grad()
def test_reasons_are_said_once(reason, caplog, monkeypatch):
    monkeypatch.setattr(notes, "_said", set())
    caplog.set_level("INFO", logger="peftkern")
    x, weight, bias, adapters = many(CHOICE, RANKS, 3)
    call = REASONS[reason](x, weight, bias, adapters)
    index = SampleIndex(CHOICE, len(RANKS))
    try:
        for _ in range(2):
            lora_mixed(*call, index)
    except RuntimeError:  # dtypes that torch refuses too
        pass
    assert caplog.text.count(reason) == 1 and "copies its adapters' factors" in caplog.text


@torch.no_grad()
def test_names_that_were_used_are_copied_and_pickled():
    layer, x = layer_of(), torch.randn(4, 3, 12, dtype=torch.float64)
    names = AdapterNames(NAMES)
    want = [layer(x, adapter_names=names) for _ in range(3)][0]
    for other in (pickle.loads(pickle.dumps(names)), copy.deepcopy(names)):
        assert_same_number(layer(x, adapter_names=other), want)


@torch.no_grad()
def test_what_is_kept_of_changing_ranks_is_bounded(alone):
    index = SampleIndex([0, 1], 2)
    for r in range(1, 30):
        x, weight, bias, adapters = many([0, 1], [r, 2], 2, alike=True)
        want = formula(x, weight, bias, adapters, [0, 1])
        assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)
    assert all(len(seen) <= mixed_direct._LIMIT for seen in index.batches._seen.values())
