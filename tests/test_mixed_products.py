"""Mixed batches of many adapters on torch's own products: few of them, and the right numbers."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.ops import lora_mixed as lora_mixed_module
from peftkern.ops import mixed_direct, mixed_torch
from peftkern.ops.lora_mixed import Adapter, SampleIndex, lora_mixed
from tests.closeness import assert_as_good_as_torch, assert_same_number


@pytest.fixture(params=["direct", "copies"], autouse=True)
def way(request, monkeypatch):
    """Products that read factors where they lie, where torch has them, and those on copies."""
    if request.param == "copies":
        monkeypatch.setattr(mixed_direct, "_why_not", lambda *call: "the test asks for copies")


class Products(TorchDispatchMode):
    """Counts matrix products."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def many(choice, ranks, T, K=24, N=20, dtype=torch.float64, alike=False):
    torch.manual_seed(1)
    weight, bias = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
    adapters = [
        Adapter(
            torch.randn(r, K, dtype=dtype), torch.randn(N, r, dtype=dtype), 2.0 if alike else 8 / r
        )
        for r in ranks
    ]
    return torch.randn(len(choice), T, K, dtype=dtype), weight, bias, adapters


def formula(x, weight, bias, adapters, choice):
    y = x @ weight.T + bias
    rows = []
    for row, i in zip(y, choice, strict=True):
        if i >= 0 and adapters[i] is not None:
            A, B, scale = adapters[i]
            row = row + scale * (x[len(rows)] @ A.T @ B.T)
        rows.append(row)
    return torch.stack(rows)


BATCHES = {
    "each its own": (list(range(16)), [8] * 16),
    "ranks": ([*range(12), -1], [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 200]),
    "in any order": ([3, 0, -1, 3, 1, 0, 3, -1, 2], [2, 9, 2, 5]),
    "twice each": ([0, 1, 2, 2, 1, 0], [4, 4, 4]),
    "all one": ([1] * 5, [3, 6]),
    "none": ([-1, -1], [3]),
    "large": (list(range(4)), [250, 256, 255, 251]),
}


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("alike", [False, True], ids=["scales", "one scale"])
@pytest.mark.parametrize("batch", list(BATCHES))
def test_many_adapters(batch, alike, T):
    choice, ranks = BATCHES[batch]
    x, weight, bias, adapters = many(choice, ranks, T, alike=alike)
    index = SampleIndex(choice, len(ranks))
    want = formula(x, weight, bias, adapters, choice)
    assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)
    with torch.no_grad():  # in place
        assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)
        without = [None, *adapters[1:]]
        missing = formula(x, weight, bias, without, choice)
        assert_same_number(lora_mixed(x, weight, bias, without, index), missing)
        assert_same_number(lora_mixed(x, weight, bias, adapters, index), want)
    inputs = [x, weight, *(t for a in adapters for t in a[:2])]
    for t in inputs:
        t.requires_grad_()
    got = torch.autograd.grad(lora_mixed(x, weight, bias, adapters, index).sin().sum(), inputs,
                              allow_unused=True)  # fmt: skip
    want = torch.autograd.grad(formula(x, weight, bias, adapters, choice).sin().sum(), inputs,
                               allow_unused=True)  # fmt: skip
    for ours, theirs in zip(got, want, strict=True):
        zero = torch.zeros(1, dtype=x.dtype)
        assert_same_number(zero if ours is None else ours, zero if theirs is None else theirs)


@pytest.mark.parametrize("ranks", [[8] * 64, [4, 8, 16, 32] * 16], ids=["alike", "ranks"])
@torch.no_grad()
def test_products_do_not_grow_with_the_adapters(ranks):
    choice = [7 * i % 64 for i in range(64)]
    x, weight, bias, adapters = many(choice, ranks, 16, 64, 64, torch.float32)
    with Products() as seen:
        lora_mixed(x, weight, bias, adapters, SampleIndex(choice, 64))
    # two for each rank at most; adapter by adapter: 1 + 2 * 64
    assert seen.count <= 1 + 2 * len(set(ranks))


@torch.no_grad()
def test_large_adapters_are_not_copied():
    """Two rows of many ranks each: copying A and B would take more than the calls."""
    x, weight, bias, adapters = many(range(2), [256, 256], 1, 512, 512, torch.float32)
    with Products() as seen:
        lora_mixed(x, weight, bias, adapters, SampleIndex(range(2), 2))
    assert seen.count == 1 + 2 * 2


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_bf16_activations(adapter, autocast):
    choice = [0, 2, 1, -1, 3]
    x, weight, bias, adapters = many(choice, [2, 8, 8, 5], 4)
    exact = formula(x, weight, bias, adapters, choice)
    index, rows = SampleIndex(choice, 4), []
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    adapters = [Adapter(A.to(adapter), B.to(adapter), s) for A, B, s in adapters]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lora_mixed(x, weight, bias, adapters, index)
        for row, i in zip(x, choice, strict=True):
            plain = nn.functional.linear(row, weight, bias)
            if i >= 0:
                A, B, scale = adapters[i]
                low = nn.functional.linear(row.to(A.dtype), A)
                plain = plain + nn.functional.linear(low, B) * scale
            rows.append(plain.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_as_good_as_torch({0: y}, {0: torch.stack(rows)}, {0: exact})


@pytest.mark.parametrize("ranks", [[3, 3, 3], [2, 3, 5]], ids=str)
def test_half_adapters_under_autocast_to_another_half(ranks):
    choice = [0, 1, 2, -1]
    x, weight, bias, adapters = many(choice, ranks, 3)
    half = [t.half() for t in (x, weight, bias)]
    found = [Adapter(a.A.half(), a.B.half(), a.scale) for a in adapters]
    exact = formula(
        *(t.double() for t in half),
        [Adapter(a.A.double(), a.B.double(), a.scale) for a in found],
        choice,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_mixed(*half, found, SampleIndex(choice, 3))
        rows = []
        for row, i in zip(half[0], choice, strict=True):
            plain = nn.functional.linear(row, *half[1:])
            if i >= 0:
                A, B, scale = found[i]
                plain = plain + nn.functional.linear(nn.functional.linear(row, A), B) * scale
            rows.append(plain)
    assert y.dtype == torch.bfloat16
    assert_as_good_as_torch({0: y}, {0: torch.stack(rows)}, {0: exact})


def test_a_plan_is_made_once_for_equal_layers(monkeypatch):
    made = []
    real = mixed_torch.make_plan
    monkeypatch.setattr(lora_mixed_module, "make_plan", lambda *a: made.append(a) or real(*a))
    choice = [1, 0, 1]
    x, weight, bias, adapters = many(choice, [2, 3], 4)
    index = SampleIndex(choice, 2)
    for _ in range(3):
        lora_mixed(x, weight, bias, adapters, index)
    assert len(made) == 1
    other = many(choice, [2, 4], 4)[3]
    want = formula(x, weight, bias, other, choice)
    assert_same_number(lora_mixed(x, weight, bias, other, index), want)
    assert len(made) == 2
