"""Entrants that a race throws out, and races that decide nothing."""

import logging

import pytest
import torch

import peftkern
from peftkern.ops import (
    auto_backend,
    auto_report,
    choices,
    race,
    sampled,
    torch_backend,
    triton_backend,
    tuned,
)
from peftkern.ops.lora_mixed import SampleIndex, lora_mixed
from tests.kernels.racing import FakeClock, decided, dispatcher, drawn, entry, step

WAYS = ("torch", *triton_backend.PRODUCTS)


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
            y[4, 7] += 0.1 * y.norm()  # in no row that is compared with float64
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
    (told,) = caplog.messages
    truth = {
        "one element": "torch",
        "unwritten": "float64 in Y",
        "another shape": "float64 in shape",
    }
    assert told.startswith(
        "fused is left out of a race of forward, M<=16 N=24 K=40 r=4 in float32: "
    )
    assert f"its result differs from {truth.get(what, 'float64 in S')} by " in told
    assert decided("forward").why.endswith("without fused")
    found = tuned.book(-1).cached.find(entry("forward", "torch").key)
    assert set(found.times) == set(WAYS) - {"fused"} and "differs" in found.left_out["fused"]
    x, w, A, B = drawn()
    assert torch.equal(y, torch_backend.infer(x, w, None, A, B, 2.0, False))


class LauncherError(Exception):
    """Whose text may be empty, as that of errors in C launchers is."""


@pytest.mark.parametrize("text", ["out of resource: shared memory", ""])
def test_a_way_that_fails_is_left_out_and_its_error_is_named(clock, monkeypatch, caplog, text):
    def change(done):
        raise LauncherError(text) if text else LauncherError

    spoil(monkeypatch, "fused", change)
    clock.times = {"hybrid": 0.11}
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        step(*drawn())
    assert decided("forward").how == "hybrid" and "without fused" in decided("forward").why
    (told,) = caplog.messages
    said = f"LauncherError: {text}" if text else "LauncherError"
    assert told.startswith("fused is left out of a race of forward, ") and told.endswith(
        f": {said}"
    )
    assert tuned.book(-1).cached.find(entry("forward", "hybrid").key).left_out == {"fused": said}


# ---- torch is measured as the others are ---------------------------------------------------------


def mixed_call():
    x, w, A, B = drawn(M=6, grad=False)
    index = SampleIndex([0, -1, 1], 2)
    adapters = [(A, B, 0.5), (A[:2], B[:, :2], 2.0)]
    return lora_mixed(x.view(3, 2, -1), w, None, adapters, index)


def infer_call():
    x, w, A, B = drawn(grad=False)
    return peftkern.lora_linear(x, w, None, A, B, 2.0)


CALLS = {
    "forward": lambda: step(*drawn())[0],
    "backward": lambda: torch.cat([t.flatten() for t in step(*drawn())[1:]]),
    "infer": infer_call,
    "mixed": mixed_call,
}
# operation, and which of its outputs is wrong
OUTPUTS = [
    ("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("backward", 2),
    ("infer", 0), ("mixed", 0),
]  # fmt: skip


def spoil_ways(monkeypatch, op, output, hows):
    """Make the ways ``hows`` compute the same wrong numbers for one output of an operation."""
    real = getattr(choices, op)

    def wrong(how, *args):
        result = real(how, *args)
        if how in hows:
            t = choices.tensors(result)[output]
            t.mul_(1.25)
        return result

    monkeypatch.setattr(choices, op, wrong)


def of(op):
    (decision,) = [d for k, d in tuned.book(-1).decisions.items() if k.op == op]
    return decision


@pytest.mark.parametrize(("op", "output"), OUTPUTS)
def test_a_wrong_torch_is_thrown_out_and_a_right_kernel_wins(
    clock, monkeypatch, caplog, op, output
):
    with peftkern.use_backend("torch"):
        want = CALLS[op]()
    spoil_ways(monkeypatch, op, output, {"torch"})
    clock.fastest = "torch"
    with caplog.at_level(logging.WARNING, logger="peftkern"), peftkern.use_backend("auto"):
        got = CALLS[op]()
        assert torch.equal(got, want)
        again = CALLS[op]()
    assert torch.equal(again, want)
    (told,) = caplog.messages
    assert told.startswith(f"torch is left out of a race of {op}")
    assert "its result differs from float64 in " in told
    (key,) = [k for k in tuned.book(-1).cached.entries if k.op == op and not k.graph]
    found = tuned.book(-1).cached.find(key)
    assert of(op).how == found.choice != "torch" and of(op).why.endswith("without torch")
    assert set(found.left_out) == {"torch"} and "torch" not in found.times
    assert of(op).gain is None
    if op == "forward":
        assert "auto: " in auto_report.describe(got, torch.float32, (24, 40, 4, 1))


def test_a_wrong_kernel_is_thrown_out_though_torch_agrees_with_it(clock, monkeypatch, caplog):
    spoil_ways(monkeypatch, "forward", 0, {"torch", "fused"})
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        step(*drawn())
    assert decided("forward").how in ("hybrid", "joined")
    assert decided("forward").why.endswith("without torch, fused")
    assert [m.split(" is left out")[0] for m in caplog.messages] == ["torch", "fused"]


@pytest.mark.parametrize("op", list(CALLS))
def test_where_nobody_is_right_torch_is_taken_for_good(clock, monkeypatch, caplog, op):
    spoil_ways(monkeypatch, op, 0, {*WAYS, "decode", "mixed"})
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        CALLS[op]()
        ran = clock.races
        CALLS[op]()
    assert clock.races == ran  # not raced again
    (told,) = caplog.messages
    assert told.startswith(f"no way of {op}") and "torch is taken: torch: its result" in told
    assert of(op).how == of(op).in_graph == "torch" and "no way is right" in of(op).why
    assert not [k for k in tuned.book(-1).cached.entries if k.op == op]


def test_a_torch_that_fails_or_is_not_finite_is_no_truth_either(clock, monkeypatch, caplog):
    real = choices.infer
    for k, broken in enumerate((lambda y: y.fill_(float("nan")), lambda y: y.no_such_thing)):
        monkeypatch.setattr(
            choices, "infer", lambda how, *a, f=broken: (f if how == "torch" else torch.clone)(
                real(how, *a)
            )
        )  # fmt: skip
        x, w, A, B = drawn(M=20 + 20 * k, grad=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="peftkern"):
            y = peftkern.lora_linear(x, w, None, A, B, 2.0)
        assert torch.equal(y, torch_backend.infer(x, w, None, A, B, 2.0, False))
        assert [m.split(" of infer")[0] for m in caplog.messages] == ["torch is left out of a race"]
    assert {d.how for d in tuned.book(-1).decisions.values()} == {"fused"}


def test_in_a_graph_a_wrong_torch_does_not_count_either(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock("torch", in_graph="decode")):
        spoil_ways(monkeypatch, "infer", 0, {"torch"})
        infer_call()
        assert decided("infer").how != "torch" and decided("infer").in_graph == "decode"
        assert all("torch" in e.left_out for e in tuned.book(-1).cached.entries.values())
        assert {k.graph for k in tuned.book(-1).cached.entries} == {True, False}


def test_a_truth_that_cannot_be_computed_is_no_ways_fault(clock, monkeypatch, caplog):
    def broken(*a):
        raise ZeroDivisionError

    monkeypatch.setattr(sampled, "product", broken)
    infer_call()
    assert decided("infer").how == "torch"
    assert decided("infer").why == "race failed: ZeroDivisionError"
    assert "left out" not in caplog.text


# ---- when nothing is decided ---------------------------------------------------------------------


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
