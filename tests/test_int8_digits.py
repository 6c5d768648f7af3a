"""Products of float32 with int8 in digits: their numbers, and when they are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.ops.bases import int8_digits
from peftkern.ops.bases.bnb8 import Bnb8
from peftkern.ops.bases.int8 import Int8
from peftkern.ops.bases.linear import frozen_linear
from peftkern.ops.bases.weight import BaseWeight
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import adapted, assert_steps_are_equal, bnb8, llama


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the integer products, all of which are taken here.

    They run as products of int32: torch's own may saturate on a processor without the instructions.
    """
    shapes: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        shapes.append((*a.shape, b.shape[1]))
        return a.int() @ b.int()

    monkeypatch.setattr(int8_digits, "integer_product", product)
    monkeypatch.setattr(int8_digits, "gains", lambda rows, elements: True)
    return shapes


def drawn(M: int, R: int, how: str) -> Tensor:
    x = torch.randn(M, R)
    if how == "outliers":
        x[:, ::17] *= 300.0
    if how == "scales":  # rows of very different sizes, one of them zero
        x *= torch.logspace(-37, 33, M).unsqueeze(1)
        x[0] = 0.0
    return x


@pytest.mark.parametrize("how", ["normal", "outliers", "scales"])
@pytest.mark.parametrize("M", [1, 5])
def test_the_error_is_not_above_that_of_float32(taken: Any, M: int, how: str) -> None:
    torch.manual_seed(0)
    q = torch.randint(-128, 128, (37, 129), dtype=torch.int8)
    for matrix in (q.t(), q):
        x = drawn(M, matrix.shape[0], how)
        if how == "scales" and M == 1:
            x = drawn(5, matrix.shape[0], how)[1:2]  # 1e-19 or so
        y = int8_digits.multiply(x, matrix)
        assert y is not None and taken[-1][0] == 4 * M
        assert_as_good_as_torch(y, x @ matrix.float(), x.double() @ matrix.double())


def test_the_largest_sums_fit_into_an_int32(taken: Any) -> None:
    R = int8_digits._MOST_SUMMED
    q = torch.full((R, 2), -128, dtype=torch.int8)
    x = torch.full((1, R), -(2.0 - 2.0**-23))
    y = int8_digits.multiply(x, q)
    assert y is not None and torch.equal(y.double(), (x.double() @ q.double()).float().double())
    assert int8_digits.multiply(torch.ones(1, R + 1), torch.ones(R + 1, 1).char()) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("M", [1, 3])
def test_numbers_that_are_not_finite_stay(taken: Any, M: int, value: float) -> None:
    x, q = torch.randn(M, 8), torch.randint(1, 9, (4, 8), dtype=torch.int8)
    x[-1, 2] = value
    packed = Int8(q, torch.ones(4), "test")
    y, dx = packed.product(x, None), packed.grad_input(x[:, :4], None)
    assert not taken and not y[-1].isfinite().any() and not dx[-1].isfinite().any()
    assert y[:-1].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "LLM.int8"])
def test_formats_multiply_in_digits_both_ways(taken: Any, name: str) -> None:
    torch.manual_seed(1)
    q, scale = torch.randint(-128, 128, (6, 10), dtype=torch.int8), torch.rand(6) + 0.5
    packed: Any = Int8(q, scale.unsqueeze(1), "test")
    if name == "LLM.int8":
        packed = Bnb8(q, scale, 6.0, False)
    dense = packed.dense(torch.float64)
    for M in (1, 3):
        x, dy = torch.randn(M, 10), torch.randn(M, 6)
        w = packed.dense(torch.float32)
        for start in (None, torch.ones(M, 1)):
            y = None if start is None else start.repeat(1, 6)
            dx = None if start is None else start.repeat(1, 10)
            taken.clear()
            found = packed.product(x, y), packed.grad_input(dy, dx)
            assert taken == [(4 * M, 10, 6), (4 * M, 6, 10)]
            for made, out, given, matrix in zip(
                found, (y, dx), (x, dy), ((w.t(), dense.t()), (w, dense)), strict=True
            ):
                assert out is None or made is out
                add = 0 if start is None else 1
                exact = given.double() @ matrix[1] + add
                assert_as_good_as_torch(made, given @ matrix[0] + add, exact, average=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_training_step_of_llm_int8_equals_hf_pefts(taken: Any, p: float) -> None:
    settings = {"lora_dropout": p}
    assert_steps_are_equal(*adapted(llama(bnb8), **settings), settings)
    assert taken


def test_gradients_of_a_batch_of_outputs_have_no_digits(taken: Any) -> None:
    q = torch.randint(-128, 128, (6, 10), dtype=torch.int8)
    x = torch.randn(3, 10, requires_grad=True)
    y = frozen_linear(x, BaseWeight(Int8(q, torch.ones(6), "test"), x.dtype), None)
    assert taken
    taken.clear()
    batch = torch.randn(2, 3, 6)
    [dx] = torch.autograd.grad(y, x, batch, is_grads_batched=True)
    torch.testing.assert_close(dx, batch @ q.float())
    assert not taken


def test_processors_that_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(rows: int, elements: int, **found: Any) -> bool:
        int8_digits.most_rows.cache_clear()
        cpu = SimpleNamespace(get_capabilities=lambda: found)
        monkeypatch.setattr(int8_digits.torch, "cpu", cpu)
        return int8_digits.gains(rows, elements)

    large = 2**24
    try:
        for name, most in (("AMD EPYC", 10**6), ("Intel Xeon", 32)):
            cpu = {"cpu_name": name, "avx512_vnni": True}
            assert at(1, large, **cpu) and at(2, large, **cpu) and at(most, large, **cpu)
            assert at(most + 1, large, **cpu) is (name == "AMD EPYC")
            assert not at(1, 512 * 1792, **cpu) and at(2, 512 * 1792, **cpu)
            assert not at(16, 512 * 512, **cpu) and at(32, 512 * 512, **cpu)
        assert not at(2, large, cpu_name="AMD EPYC") and not at(1, large)
        monkeypatch.setattr(int8_digits, "integer_product", None)  # a torch without the name
        assert not at(2, large, cpu_name="AMD EPYC", avx512_vnni=True)
    finally:
        int8_digits.most_rows.cache_clear()


@pytest.mark.skipif(not int8_digits.most_rows(), reason="no AVX512-VNNI, or torch before 2.13")
def test_torchs_own_product_of_integers() -> None:
    torch.manual_seed(2)
    q = torch.randint(-128, 128, (512, 2048), dtype=torch.int8)
    for matrix in (q.t(), q):
        x = torch.randn(9, matrix.shape[0])
        y = int8_digits.multiply(x, matrix)
        assert y is not None
        assert_as_good_as_torch(y, x @ matrix.float(), x.double() @ matrix.double())


def test_one_row_without_gradients() -> None:
    q = torch.randint(-128, 128, (6, 10), dtype=torch.int8)
    packed, x = Int8(q, torch.rand(6, 1), "test"), torch.randn(1, 10)
    y = packed.infer_row(x[0])
    exact = x.double() @ packed.dense(torch.float64).t()
    assert y.shape == (6,)
    assert_as_good_as_torch(y, (x @ packed.dense(torch.float32).t())[0], exact[0], average=True)
    narrow = Int8(q, torch.rand(6, 1), "test", torch.bfloat16)  # its products are in bf16
    assert torch.equal(narrow.infer_row(x[0]), narrow.product(x, None)[0])
