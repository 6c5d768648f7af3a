"""The dispatcher below real models, which train as on torch whatever it decides and when."""

import itertools

import pytest
import torch

import peftkern
from peftkern.ops import choices, device, triton_backend, tuned
from tests.closeness import assert_as_good_as_torch
from tests.kernels.racing import FakeClock, dispatcher
from tests.masks import with_masks
from tests.training import adapted, tiny_llama, train

WAYS = ("torch", *triton_backend.PRODUCTS)


class Changing(FakeClock):
    """Each race is won by another way than the one before."""

    def __init__(self):
        super().__init__()
        self.turns = itertools.cycle(reversed(WAYS))

    def seconds(self, name, run, repeats):
        if name == "torch" and repeats == 2:  # once a race, before the rounds
            self.fastest = next(self.turns)
        return super().seconds(name, run, repeats)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, Changing()) as clock:
        yield clock


@pytest.mark.long
def test_a_tiny_llama_trains_as_on_torch_and_races_in_its_first_step_only(clock):
    base, ids = tiny_llama(), torch.randint(0, 50, (2, 9))
    found, races = [], []
    for choice, dtype in (
        ("auto", torch.float32), ("torch", torch.float32), ("torch", torch.float64)
    ):  # fmt: skip
        model = adapted(base, r=5).to(dtype)
        with peftkern.use_backend(choice):
            losses = train(model, ids, 4, lambda: races.append(clock.races))
            with torch.no_grad():
                logits = {"one": model.eval()(ids[:1, :1]).logits, "many": model(ids).logits}
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        found.append({"losses": losses.to(dtype), **logits, **weights})
    assert races[0] > 4 and set(races[:4]) == {races[0]}
    assert {d.how for d in tuned.book(-1).decisions.values()} >= set(WAYS)
    assert_as_good_as_torch(*found)


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["nothing", "forward undecided", "backward undecided"])
def test_checkpointed_gradients_are_those_without_whatever_is_decided_between(
    clock, monkeypatch, reentrant, between
):
    """Dropout, groups and recomputation, with decisions that come before or after the forward."""
    ids = torch.randint(0, 50, (2, 9))
    capturing, seen = [False], []
    monkeypatch.setattr(device, "capturing", lambda x: capturing[0])
    drawn, draw = [], choices.words_for

    def noted(*args):
        words = draw(*args)
        drawn.extend(words)
        return words

    monkeypatch.setattr(choices, "words_for", noted)
    real = choices.forward
    monkeypatch.setattr(choices, "forward", lambda how, *a: seen.append(how) or real(how, *a))
    model = adapted(tiny_llama(), r=3, lora_dropout=0.3)
    tuned.book(-1)
    grads = []
    for checkpointed in (True, False):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_disable()
        torch.manual_seed(3)
        capturing[0] = checkpointed and between == "forward undecided"
        loss = model(input_ids=ids, labels=ids).loss
        first = seen[:]
        capturing[0] = checkpointed and between == "backward undecided"
        loss.backward()
        if checkpointed and between == "forward undecided":
            assert set(first) == {"torch"} and set(seen[len(first) :]) > {"torch"}
        grads.append(gradients_of(model))
        if checkpointed:  # the forward's masks come first
            words = drawn[:]
        drawn.clear()
    assert clock.races and words
    by_torch = []
    for dtype in (torch.float32, torch.float64):
        layers = sum(hasattr(m, "lora_A") for m in model.modules())
        one = with_masks(model, words[:layers], dtype)
        one(input_ids=ids, labels=ids).loss.backward()
        by_torch.append(gradients_of(one))
    for ours in grads:
        assert_as_good_as_torch(ours, *by_torch)


def gradients_of(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert all(grad.any() for grad in found.values())
    return found
