"""What a race throws out, and when it decides nothing."""

import logging

import pytest
import torch

import peftkern
from peftkern.ops import (
    auto_backend,
    choices,
    race,
    torch_backend,
    triton_backend,
    tuned,
)
from tests.kernels.racing import FakeClock, decided, dispatcher, drawn, entry, step

WAYS = ("torch", *triton_backend.PRODUCTS)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock()) as clock:
        yield clock


@pytest.fixture
def ran(monkeypatch):
    """(operation, way) of everything that ran."""
    seen = []
    for op in ("forward", "backward", "infer"):
        real = getattr(choices, op)

        def spy(how, *args, real=real, op=op):
            seen.append((op, how))
            return real(how, *args)

        monkeypatch.setattr(choices, op, spy)
    return seen


def spoil(monkeypatch, how, change):
    """The forward of one way gives something else."""
    real = triton_backend.forward

    def forward(x, members, words=None, way=None):
        done = real(x, members, words, way)
        return change(done) if way == how else done

    monkeypatch.setattr(triton_backend, "forward", forward)


@pytest.mark.parametrize("what", ["one element", "unwritten", "infinite", "NaN", "another shape"])
def test_a_way_with_other_numbers_is_thrown_out(clock, monkeypatch, caplog, what):
    def change(done):
        (y, s, bits) = done[0]
        if what == "one element":
            y[5, 7] += 0.1 * y.norm()
        elif what == "unwritten":
            y = torch.empty_like(y)  # the allocator gives the block that torch's result was in
        elif what == "infinite":
            s[0, 0] = float("inf")
        elif what == "NaN":
            s[-1, -1] = float("nan")
        else:
            y = y[:-1]
        return [(y, s, bits)]

    spoil(monkeypatch, "fused", change)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        y, *_ = step(*drawn())
    assert decided("forward").how == "torch"  # no other is faster
    assert "fused is left out of a race: its result differs" in caplog.text
    assert decided("forward").why.endswith("without fused")
    found = tuned.book(-1).cached.find(entry("forward", "torch").key)
    assert set(found.times) == set(WAYS) - {"fused"} and "differs" in found.left_out["fused"]
    x, w, A, B = drawn()
    assert torch.equal(y, torch_backend.infer(x, w, None, A, B, 2.0, False))


def test_a_way_that_fails_is_left_out(clock, monkeypatch):
    def change(done):
        raise RuntimeError("out of resource: shared memory")

    spoil(monkeypatch, "fused", change)
    clock.times = {"hybrid": 0.11}
    step(*drawn())
    assert decided("forward").how == "hybrid" and "without fused" in decided("forward").why


def test_out_of_memory_is_torch_for_this_process_only(clock, monkeypatch, ran):
    def change(done):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoil(monkeypatch, "fused", change)
    tuned.book(-1).keep([entry("forward", "hybrid", M=64)])  # near, and no way to go now
    step(*drawn())
    step(*drawn())
    assert decided("forward").how == "torch" and "out of memory" in decided("forward").why
    assert [(k.op, k.m) for k in tuned.book(-1).cached.entries] == [
        ("forward", 64),
        ("backward", 16),
    ]
    assert [how for op, how in ran if op == "forward"].count("fused") == 1  # not tried again


def test_numbers_that_are_not_finite_decide_nothing(clock):
    x, w, A, B = drawn()
    with torch.no_grad():
        x[0, 0] = float("inf")
    step(x, w, A, B)
    assert clock.races == 0 and decided("forward") is None
    step(*drawn())
    assert clock.races == 2 and decided("forward").how == "fused"


def test_a_gradient_of_zeros_can_be_raced(clock):
    x, w, A, B = drawn()
    with torch.no_grad():
        B.zero_()  # as LoRA starts: dA is zero, and so is the update
    step(x, w, A, B)
    assert clock.races == 2 and decided("backward").how == "fused"
    assert decided("backward").why == decided("forward").why  # nobody left out


def test_a_call_that_is_wrong_says_so_itself(clock):
    x, w, A, B = drawn(grad=False)
    with pytest.raises(RuntimeError, match="shape|size|mat"):
        peftkern.lora_linear(x, w[:, :-1], None, A, B, 2.0)
    assert decided("infer") is None


def test_a_sketch_measures_what_it_stands_for():
    a = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    estimate = race.sketch(a).norm() / a.norm()
    assert abs(estimate.item() - 1) < 0.1
    assert race.sketch(torch.zeros(0, 5)).shape == (0, 8)
    rows = a.t()[:, ::2]  # any strides
    assert torch.equal(race.sketch(rows), race.sketch(rows.contiguous()))
    race._sketches((a, None, [torch.ones(2, dtype=torch.int32)]))
    assert a.isnan().all()  # nobody finds the right numbers in freed memory
    assert race.sketch(torch.ones(5)).shape == (1, 8)


def test_numbers_that_are_never_finite_end_the_tries(clock, monkeypatch):
    monkeypatch.setattr(auto_backend, "TRIES", 3)
    x, w, A, B = drawn(grad=False)
    x[0, 0] = float("nan")
    for tried in (1, 2, 3, 3):
        peftkern.lora_linear(x, w, None, A, B, 2.0)
        (count,) = tuned.book(-1).tries.values()
        assert count == tried
    assert "not finite" in decided("infer").why
