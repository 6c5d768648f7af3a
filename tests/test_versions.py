"""Differences between versions of transformers: old and new names and ways of checkpointing.

``make test-versions`` runs the versions themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.tuners.prefix_tuning import outside
from peftkern.utils import versions
from tests.prompts import prompt_model
from tests.tiny import inputs, make


class New(nn.Module):
    def forward(self, input_ids: Tensor, cache: Any = None) -> None: ...


class Old(nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> None: ...


class Layer(nn.Module):
    def forward(self, hidden: Tensor, layer_past: Any = None, **rest: Any) -> None: ...


class Encoder(nn.Module):
    def forward(self, input_ids: Tensor, **rest: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "name"),
    [(New, "cache"), (Old, "past_key_values"), (Layer, "layer_past"), (Encoder, None)],
)
def test_the_name_is_the_one_in_the_signature(kind: Any, name: str | None) -> None:
    assert versions.cache_name(kind()) == name


def test_a_cache_is_found_under_the_names_that_the_module_takes() -> None:
    old, new = object(), object()
    both = {"past_key_values": old, "cache": new}
    assert versions.cache_of(Old(), both) is old
    assert versions.cache_of(New(), both) is new
    assert versions.cache_of(New(), {"past_key_values": old, "cache": None}) is old
    assert versions.cache_of(Old(), {"cache": new}) is None
    assert versions.cache_of(Encoder(), both) is None
    assert versions.cached_tokens(None) == 0
    kept = tf.DynamicCache()
    kept.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert versions.cached_tokens(kept) == 3


class AroundHooks(nn.Module):
    """As in transformers 5.17."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)


class InForward(nn.Module):
    """As in 5.23, and with ``needs`` as in 5.24."""

    gradient_checkpointing = False
    needs = False
    _gradient_checkpointing_func: Any

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        def checkpointing(self: Any, *args: Any) -> Any:
            wanted = torch.is_grad_enabled() or not self.needs
            if self.gradient_checkpointing and self.training and wanted:
                return self._gradient_checkpointing_func(partial(forward, self), *args)
            return forward(self, *args)

        cls.forward = checkpointing


class WithGradients(InForward):
    needs = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class Never(nn.Module): ...


class Adding(AroundHooks):
    def forward(self, x: Tensor, *, more: Tensor) -> Tensor:
        return x * more


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_stay_outside_a_checkpoint(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer as in transformers 5.17: a replay sees what its own forward was given."""
    monkeypatch.setattr(outside, "hooks_in_checkpoints", lambda: True)
    layer, factors, grads = Adding(), [2.0, 3.0], []
    weight = torch.ones(1, requires_grad=True)

    def give(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        grads.append(torch.is_grad_enabled())
        return (args[0] * weight,), {**kwargs, "more": kwargs["more"] * factors[len(grads) - 1]}

    hook = outside.Outside(None, layer, lambda *_: None, give)
    layer.gradient_checkpointing = True
    run = layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    losses = []
    for _ in factors:
        hook.prepare()
        losses.append(layer(torch.ones(1), more=torch.ones(1)))
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": reentrant}
    sum(losses).backward()
    assert grads == [True, True] and weight.grad == 5.0
    hook.remove()
    assert layer._gradient_checkpointing_func is run
    layer.gradient_checkpointing = False
    layer(torch.ones(1), more=torch.ones(1))
    assert len(grads) == 2


def test_a_call_makes_no_copy_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is slow, and torch.compile before torch 2.13 cannot trace it."""
    model = prompt_model(peftkern, "prefix")
    monkeypatch.setattr(type(model.config), "to_dict", lambda _: pytest.fail("to_dict was called"))
    model(**inputs("llama"))


def test_ways_of_checkpointing_are_told_apart() -> None:
    assert versions.how_checkpointed(AroundHooks) == (True, True)
    assert versions.how_checkpointed(InForward) == (False, True)
    assert versions.how_checkpointed(WithGradients) == (False, False)
    with pytest.raises(RuntimeError, match="a Never of transformers runs in no checkpoint"):
        versions.how_checkpointed(Never)


def test_a_cap_that_is_dropped_is_told_from_one_that_is_not() -> None:
    def capped(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        scores = q @ k.mT * more["scaling"]
        cap = more.get("softcap")
        return (scores if cap is None else cap * (scores / cap).tanh()).softmax(-1) @ v, None

    def dropped(*args: Any, softcap: Any = None, **more: Any) -> Any:
        return capped(*args, **more)

    def refused(*args: Any, softcap: Any = None, **more: Any) -> Any:
        if softcap is not None:
            raise ValueError("no softcap")
        return capped(*args, **more)

    assert not versions._ignores_softcap(capped)
    assert versions._ignores_softcap(dropped)
    assert not versions._ignores_softcap(refused)


def test_a_layer_is_in_a_checkpoint_when_transformers_puts_it_there() -> None:
    model = make("llama", None)
    layer, ids, runs = model.layers[0], torch.ones(1, 2, dtype=torch.long), []
    model.gradient_checkpointing_enable()
    layer._gradient_checkpointing_func = lambda f, *a: runs.append(f) or f(*a)
    for mode in (True, False):
        model.train(mode)
        for grad in (True, False):
            runs.clear()
            with torch.set_grad_enabled(grad):
                model(ids)
                assert versions.in_checkpoint(layer) == bool(runs)
