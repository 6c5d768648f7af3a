"""Races of prefix attention: what is wrong, torch's way too, is thrown out by float64."""

import logging

import pytest
import torch

import peftkern
from peftkern.ops import prefix_attention as operation
from peftkern.ops import prefix_auto, prefix_kernel
from peftkern.ops.prefix_attention import prefix_attention
from tests.closeness import assert_as_good_as_torch
from tests.kernels.racing import FakeClock, dispatcher
from tests.prefix_cases import NAMES, SCALE, gradients, truth
from tests.prefix_cases import inputs as tensors_of

OPTIONS = {"scale": SCALE, "causal": True}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setattr(prefix_auto, "_decisions", {})
    with dispatcher(monkeypatch, tmp_path, FakeClock("torch")) as clock:
        yield clock


def drawn(T=6):
    return tensors_of(2, 4, 2, T, T, 5, 8, dtype=torch.float32)


def spoil_torch(monkeypatch, name):
    """Torch's way gives a wrong output, or a wrong gradient of one input."""
    real, at = operation._by_torch, NAMES.index(name) - 1

    def wrong(*args, **more):
        args = list(args)
        if at >= 0:  # the same number, whose gradient counts more
            args[at] = args[at] + 0.25 * (args[at] - args[at].detach())
        o = real(*args, **more)
        return o if at >= 0 else o * 1.25

    monkeypatch.setattr(operation, "_by_torch", wrong)


def spoil_kernel(monkeypatch, name):
    at = NAMES.index(name) - 1
    forward, backward = prefix_kernel.forward, prefix_kernel.backward
    if at < 0:
        monkeypatch.setattr(prefix_kernel, "forward", lambda *a: _scaled(forward(*a), 0))
    else:
        monkeypatch.setattr(prefix_kernel, "backward", lambda *a: _scaled(backward(*a), at))


def _scaled(found, at):
    return tuple(1.25 * t if i == at else t for i, t in enumerate(found))


def exact_of(tensors):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return dict(zip(NAMES, gradients(truth(wide, {}), wide), strict=True))


def the_decision():
    (found,) = prefix_auto._decisions.values()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_torch_is_thrown_out_and_a_right_kernel_wins(clock, monkeypatch, caplog, name):
    tensors = drawn()
    with peftkern.use_backend("torch"):
        expected = gradients(prefix_attention(*tensors, **OPTIONS), tensors)
    spoil_torch(monkeypatch, name)
    with caplog.at_level(logging.WARNING, "peftkern"), peftkern.use_backend("auto"):
        found = gradients(prefix_attention(*tensors, **OPTIONS), tensors)
    (told,) = caplog.messages
    assert told.startswith("torch is left out of a race of prefix attention, with gradients, query")
    assert "its result differs from float64 in " in told
    winner, why = the_decision()
    assert winner == "kernel" and why.startswith("raced in this process without torch: its result")
    exact = exact_of(tensors)
    assert_as_good_as_torch(*(dict(zip(NAMES, of, strict=True)) for of in (found, expected)), exact)


@pytest.mark.parametrize("name", ["output", "query", "prefix_key"])
def test_a_wrong_kernel_is_thrown_out_though_torch_agrees_with_it(clock, monkeypatch, caplog, name):
    """And torch is taken, as there is no third way; it is not raced again."""
    spoil_torch(monkeypatch, name)
    spoil_kernel(monkeypatch, name)
    tensors = drawn()
    with caplog.at_level(logging.WARNING, "peftkern"):
        for _ in range(2):
            prefix_attention(*tensors, **OPTIONS)
    (told,) = caplog.messages
    assert told.startswith("no way of prefix attention, with gradients, query [2, 4, 6, 8]")
    assert "torch: its result differs" in told and "kernel: its result differs" in told
    winner, why = the_decision()
    assert winner == "torch" and why.startswith("no race: no way is right")
    assert clock.races == 0


@pytest.mark.parametrize("name", ["output", "value", "prefix_value"])
def test_a_wrong_kernel_alone_leaves_torch(clock, monkeypatch, caplog, name):
    clock.fastest = "kernel"
    spoil_kernel(monkeypatch, name)
    tensors = drawn()
    with caplog.at_level(logging.WARNING, "peftkern"):
        prefix_attention(*tensors, **OPTIONS)
    (told,) = caplog.messages
    assert told.startswith("kernel is left out of a race of prefix attention, with gradients")
    assert the_decision()[0] == "torch"


@pytest.mark.parametrize("training", [True, False])
def test_a_torch_that_fails_leaves_the_call_to_the_kernel(clock, monkeypatch, caplog, training):
    class LauncherError(Exception):
        pass

    def broken(*args, **more):
        raise LauncherError

    monkeypatch.setattr(operation, "_by_torch", broken)
    tensors = drawn()
    with caplog.at_level(logging.WARNING, "peftkern"), torch.set_grad_enabled(training):
        prefix_attention(*tensors, **OPTIONS)
    (told,) = caplog.messages
    assert told.startswith("torch is left out of a race") and told.endswith(": LauncherError")
    winner, why = the_decision()
    assert winner == "kernel" and why.endswith("without torch: LauncherError")


def test_only_the_gradients_that_are_asked_for_are_raced(clock):
    """Sinks that train alone: their gradient is not raced, and there is no other."""
    clock.fastest = "kernel"
    tensors = [t.detach() for t in drawn()]
    sinks = torch.zeros(4, requires_grad=True)
    prefix_attention(*tensors, sinks=sinks, **OPTIONS).sum().backward()
    assert sinks.grad.any() and clock.races == 1
    assert the_decision()[0] == "kernel" and "as fast as torch" in the_decision()[1]
