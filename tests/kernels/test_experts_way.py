"""lora_experts on the kernels, forward and backward, and the dispatcher's choice of them."""

from __future__ import annotations

import logging

import pytest
import torch

import peftkern
from peftkern.ops import notes
from peftkern.ops.experts import choosing, loop, triton_way
from peftkern.ops.experts.parts import Call
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_as_good_as_torch
from tests.mixtures import E, Mixture, formula, mixture, numbers

SIZES = (9, 24, 20, 18, 5, 2)  # tokens, in, inner, out, experts, choices


def call(m: Mixture, **kwargs) -> torch.Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice, **kwargs)


def on_kernels(m: Mixture, **kwargs) -> torch.Tensor:
    with peftkern.use_backend("triton"):
        assert way_of(m) == "triton"
        return call(m, **kwargs)


def way_of(m: Mixture, keep: bool | None = None) -> str:
    keep = torch.is_grad_enabled() if keep is None else keep
    return choosing.choose(Call(*m, False), keep=keep).name


def check(m: Mixture) -> None:
    """The kernels' numbers are as near to the formula in float64 as torch's."""
    with peftkern.use_backend("triton"):
        assert way_of(m) == "triton"
        ours = numbers(call, m)
    torchs = numbers(call, m)
    exact = numbers(formula, m.to(torch.float64))
    assert_as_good_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("gate", ["halves", "interleaved", "alone", "function"])
@pytest.mark.parametrize(
    "ranks", [((3,), (2,)), ((3,), ()), ((), (2,))], ids=["both", "up", "down"]
)
def test_values_and_gradients(gate, ranks):
    check(mixture(gate, ranks=ranks, dtype=torch.float32, sizes=SIZES))


@pytest.mark.parametrize("ranks", [((3,), (2,)), ((34,), (66,))], ids=["one pass", "two passes"])
@pytest.mark.parametrize("trained", ["A and B", "A", "B"])
def test_b_is_copied_or_read_as_peft_has_it_where_an_expert_has_many_rows(ranks, trained):
    m = mixture(ranks=ranks, dtype=torch.float32, sizes=(16 * 2, 12, 10, 9, 2, 1))
    assert m.index.numel() >= triton_way.COPIED_FROM * m.up.weight.shape[0]
    for part in (m.up, m.down):
        for f in part.factors:
            f.A.requires_grad_("A" in trained.split())
            f.B.requires_grad_("B" in trained.split())
    check(m)


@pytest.mark.parametrize("down, written", [(16, False), (17, True)])
def test_an_h_that_is_written_for_a_wide_rank_is_said(down, written, caplog, monkeypatch):
    """Exact products leave registers for 16 ranks of dA of down."""
    monkeypatch.setattr(notes, "_said", set())
    with caplog.at_level(logging.INFO, "peftkern"):
        check(mixture(ranks=((3,), (down,)), dtype=torch.float32, sizes=SIZES))
    said = "a mixture's backward writes H: dA of down has rank 17, too large beside up's 3"
    assert (said in caplog.text) == written and ("writes H" in caplog.text) == written


@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_with_float32_adapters(transposed):
    m = mixture(dtype=torch.float16, low=torch.float32, transposed=transposed, sizes=SIZES)
    check(m)


def test_bias_and_its_share_of_the_routing_weights_gradient():
    m = mixture(bias=True, dtype=torch.float32, sizes=SIZES)
    for part in (m.up, m.down):
        part.bias.requires_grad_(False)
    check(m)


@pytest.mark.parametrize("wanted", ["x", "weights", "A up", "B up", "A down", "B down"])
def test_only_what_is_wanted(wanted):
    m = mixture(dtype=torch.float32, sizes=SIZES)
    up, down = m.up.factors[0], m.down.factors[0]
    leaves = {
        "x": m.x, "weights": m.weights, "A up": up.A, "B up": up.B, "A down": down.A,
        "B down": down.B,
    }  # fmt: skip
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    check(m)


def test_dropout_drops_the_same_elements_as_torchs_way():
    m = mixture(p=0.4, dtype=torch.float32, sizes=SIZES)
    torch.manual_seed(3)
    expected = numbers(call, m)
    torch.manual_seed(3)
    ours = numbers(on_kernels, m)
    torch.manual_seed(3)
    exact = numbers(call, m.to(torch.float64))
    assert_as_good_as_torch(ours, expected, exact)


MANY = (40, *SIZES[1:])  # more pairs than the kernels for few take


@pytest.mark.parametrize("sizes", [SIZES, MANY], ids=["few", "many"])
@pytest.mark.parametrize("ranks", [((3, 1), (2, 4)), ((0, 3), (2, 0))], ids=["two", "parts"])
def test_each_token_has_its_own_adapter(ranks, sizes):
    m = mixture(ranks=ranks, mixed=True, dtype=torch.float32, sizes=sizes)
    with torch.no_grad():
        ours, torchs = on_kernels(m), call(m)
        assert_as_good_as_torch(ours, torchs, formula(m.to(torch.float64)))


@pytest.mark.parametrize("sizes", [SIZES, MANY], ids=["few", "many"])
@pytest.mark.parametrize("gate", ["halves", "alone", "function"])
@pytest.mark.parametrize(
    "ranks", [((3,), (2,)), ((), (2,)), ((), ())], ids="both down none".split()
)
def test_without_gradients(gate, ranks, sizes, monkeypatch):
    m = mixture(gate, ranks=ranks, bias=True, dtype=torch.float32, sizes=sizes)
    ran = []
    real = triton_way.decode
    monkeypatch.setattr(triton_way, "decode", lambda *a, **k: ran.append(1) or real(*a, **k))
    with torch.no_grad():
        ours, torchs = on_kernels(m), call(m)
        assert_as_good_as_torch(ours, torchs, formula(m.to(torch.float64)))
    assert bool(ran) == (sizes is SIZES and gate != "function")


@pytest.mark.parametrize("grad", [False, True])
def test_an_expert_or_an_adapter_out_of_range_is_refused(grad):
    m = mixture(dtype=torch.float32, sizes=SIZES)
    for wrong in (SIZES[4], -1):
        m.index[1, 1] = wrong
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError), match="index"):
            on_kernels(m)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError), match="index"):
        on_kernels(m, sentinels=True)
    m = mixture(dtype=torch.float32, mixed=True, ranks=((3, 1), (2, 4)), sizes=SIZES)
    m.choice[2] = 2
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="choice"):
        on_kernels(m)


def test_experts_of_other_processes_add_nothing():
    m = mixture(dtype=torch.float32, sizes=SIZES)
    m.index[0, 0] = m.index[3] = E + 7
    found = numbers(lambda m: on_kernels(m, sentinels=True), m)
    expected = numbers(lambda m: call(m, sentinels=True), m)
    exact = numbers(lambda m: call(m, sentinels=True), m.to(torch.float64))
    assert_as_good_as_torch(found, expected, exact)
    assert not found["y"][3].any()


def test_no_tokens():
    m = mixture(dtype=torch.float32, sizes=(0, 24, 20, 18, 5, 2))
    found = numbers(on_kernels, m)
    assert found["y"].shape == (0, 18) and not any(t.any() for t in found.values())


def test_two_passes_give_the_same_bits():
    m = mixture(p=0.2, dtype=torch.float32, sizes=SIZES)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(numbers(on_kernels, m))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_second_derivatives():
    m = mixture(dtype=torch.float32, sizes=SIZES)

    def second(m: Mixture) -> torch.Tensor:
        (dx,) = torch.autograd.grad(call(m).square().sum(), m.x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), m.up.factors[0].A)[0]

    torchs, exact = second(m), second(m.to(torch.float64))
    with peftkern.use_backend("triton"):
        # several products deep, as a whole model
        assert_as_good_as_torch(second(m), torchs, exact, average=True)


REFUSED = {
    "a norm follows each expert": lambda: mixture(norm=True, dtype=torch.float32),
    "several adapters": lambda: mixture(ranks=((3, 1), (2,)), dtype=torch.float32),
    "a bias trains": lambda: mixture(bias=True, dtype=torch.float32),
    "gradients are wanted": lambda: mixture(mixed=True, dtype=torch.float32),
    "dtype torch.float64": lambda: mixture(),
    "rank 257": lambda: mixture(ranks=((257,), ()), dtype=torch.float32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_calls_run_on_torch_with_the_reason(reason, caplog, monkeypatch):
    m = REFUSED[reason]()
    exact = numbers(formula, m.to(torch.float64))
    torchs = numbers(call, m)
    monkeypatch.setattr(notes, "_said", set())
    with peftkern.use_backend("triton"), caplog.at_level(logging.INFO, "peftkern"):
        assert way_of(m, keep=True) != "triton"
        assert_as_good_as_torch(numbers(call, m), torchs, exact)
    assert reason in caplog.text


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("fastest", "expected"), [("kernels", "triton"), ("torch", "loop")])
def test_auto_takes_what_was_faster(clock, grad, fastest, expected):
    m = mixture(dtype=torch.float32, p=0.1 if grad else 0.0, sizes=SIZES)
    clock.fastest = fastest
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        found = choosing.choose(Call(*m, False), keep=grad)
        assert found.name == expected and "raced here" in found.reason
        assert torch.equal(torch.get_rng_state(), state)
        assert clock.races == 1
        assert way_of(m) == expected and clock.races == 1  # decided once
        if not grad:
            assert_as_good_as_torch(call(m), loop_of(m), formula(m.to(torch.float64)))


def loop_of(m: Mixture) -> torch.Tensor:
    made = Call(*m, False)
    y, _ = loop.forward(made, loop.ordered(made), (None, None), keep=False)
    return y


def test_a_wrong_way_is_left_out(clock, monkeypatch, caplog):
    real = triton_way.combine
    monkeypatch.setattr(triton_way, "combine", lambda *args, **kwargs: real(*args, **kwargs) * 1.1)
    clock.fastest = "kernels"
    assert way_of(mixture(dtype=torch.float32, sizes=SIZES)) == "loop"
    assert "kernels is left out of a race of experts_step" in caplog.text
