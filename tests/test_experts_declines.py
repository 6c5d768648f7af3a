"""When experts with adapters are not one operation: the reasons, the numbers, and dropout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import peftkern
from peftkern.tuners.lora import experts_call
from tests import moe, moe_models
from tests.closeness import assert_same_number
from tests.moe_models import alone, experts_of, fused, ids, numbers, tiny, tiny_pair, wrappers
from tests.tiny import assert_same, snapshot


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _own_forward(model: Any) -> None:
    experts = experts_of(model)
    forward = type(experts).forward
    experts.forward = lambda *args: 2 * forward(experts, *args)


def _subclass(model: Any) -> None:
    experts = experts_of(model)

    class Other(type(experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return 2 * super().forward(*args)

    experts.__class__ = Other


def _registered(model: Any) -> None:
    ALL_EXPERTS_FUNCTIONS.register("of_the_test", lambda self, *args: type(self).eager(self, *args))
    experts = experts_of(model)
    type(experts).eager = moe_models._Experts.forward
    experts.config._experts_implementation = "of_the_test"


def _inner_hook(model: Any) -> None:
    wrappers(model)[1].register_forward_hook(lambda module, args, out: out)


def _buffer(model: Any) -> None:
    experts = experts_of(model)
    weight = experts.down_proj.detach()
    del experts.down_proj
    experts.register_buffer("down_proj", weight)


def _other_a(model: Any) -> None:
    a = wrappers(model)[0].lora_A["default"]
    a.__class__ = type("Marked", (nn.Linear,), {})


# {name: (a change of a model, a part of the reason)}; HF PEFT's layers have the same attributes
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (
        lambda m: experts_of(m).register_forward_hook(lambda _, __, out: 2 * out),
        "the experts have hooks",
    ),
    "a hook before": (
        lambda m: experts_of(m).register_forward_pre_hook(lambda _, a: (2 * a[0], *a[1:])),
        "the experts have hooks",
    ),
    "own forward": (_own_forward, "an overridden forward"),
    "subclass": (_subclass, "Other is not a class of transformers' experts interface"),
    "registered": (_registered, "the experts implementation is 'of_the_test'"),
    "trained weight": (
        lambda m: experts_of(m).gate_up_proj.requires_grad_(True),
        "gate_up_proj requires a gradient",
    ),
    "hooked activation": (
        lambda m: experts_of(m).act_fn.register_forward_hook(lambda _, __, out: 2 * out),
        "act_fn has hooks",
    ),
    "parametrized": (
        lambda m: parametrize.register_parametrization(experts_of(m), "gate_up_proj", Twice()),
        "gate_up_proj is parametrized",
    ),
    "no parameter": (_buffer, "down_proj is a NoneType, not a plain Parameter"),
}
OURS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hooked wrapper": (_inner_hook, "has hooks or an overridden forward"),
    "hooked A": (
        lambda m: wrappers(m)[0].lora_A["default"].register_forward_hook(lambda *a: None),
        "lora_A has hooks",
    ),
    "another A": (_other_a, "lora_A is a Marked, not an nn.Linear"),
    "double A": (
        lambda m: wrappers(m)[0].lora_A["default"].half(),
        "dtypes: experts torch.float64, lora_A torch.float16",
    ),
    "other dropout": (
        lambda m: wrappers(m)[0].lora_dropout.update({"default": Twice()}),
        "dropout is a Twice",
    ),
}


def _wrappers_of(model: Any) -> Any:
    module, found = model.base_model.model.experts, []
    while hasattr(module, "base_layer"):
        found.append(module)
        module = module.base_layer
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_what_declines_computes_what_hf_peft_does(name: str, monkeypatch, caplog) -> None:
    change, reason = CHANGES[name]
    monkeypatch.setattr("tests.test_experts_declines.wrappers", _wrappers_of)
    monkeypatch.setattr("tests.moe_models.wrappers", _wrappers_of)
    ours, theirs = tiny_pair()
    assert all(fused(ours))
    for model in (ours, theirs):
        change(model)
    rows = peftkern.explain(ours)
    assert not any(row.fused for row in rows) and all(reason in row.reason for row in rows)
    assert all("gets W + scaling · B A" in row.reason for row in rows)
    with caplog.at_level(logging.INFO, "peftkern"):
        got = numbers(ours)
        numbers(ours)
    assert_same_number(got, numbers(theirs))
    said = [r.message for r in caplog.records if reason in r.message]
    assert len(said) == 1, caplog.text


@pytest.mark.parametrize("name", OURS)
def test_reasons_within_the_wrappers(name: str) -> None:
    change, reason = OURS[name]
    ours, _ = tiny_pair()
    change(ours)
    rows = peftkern.explain(ours)
    assert not any(row.fused for row in rows) and all(reason in row.reason for row in rows)


def test_a_replaced_implementation_of_a_known_name(monkeypatch) -> None:
    ours = alone()
    experts_of(ours).config._experts_implementation = "grouped_mm"
    assert all(fused(ours))
    own = lambda *args: grouped_mm_experts_forward(*args)  # noqa: E731
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", own)
    assert not any(fused(ours))
    assert "'grouped_mm' is not transformers' own" in peftkern.explain(ours)[0].reason


def test_offloaded_weights() -> None:
    ours = alone()
    experts = experts_of(ours)
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"), requires_grad=False)
    assert "down_proj is on the meta device" in peftkern.explain(ours)[0].reason


def test_a_transform_of_torch_func_is_no_reason() -> None:
    """HF PEFT's wrapper fails in one, as the parametrization of a call mutates the module."""
    ours, _ = tiny_pair()
    x = torch.randn(3, 4, moe_models.WIDTH, dtype=torch.float64)
    index, weights = torch.tensor([[0, 1]] * 4), torch.ones(4, 2, dtype=torch.float64)

    experts = ours.base_model.model.experts

    def loss(x: torch.Tensor) -> torch.Tensor:
        return experts(x, index, weights).cos().sum()

    leaf = x[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert_same_number(torch.func.grad(loss)(x[0]), want)


def test_gradients_of_factors_by_torch_func() -> None:
    """`functional_call` puts plain tensors in the place of the factors."""
    ours, _ = tiny_pair()
    factors = {n: p.detach() for n, p in ours.named_parameters() if p.requires_grad}

    def loss(factors: Any) -> torch.Tensor:
        return torch.func.functional_call(ours, factors, (moe_models.ids(),)).cos().mean()

    ours(moe_models.ids()).cos().mean().backward()
    want = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert_same_number(torch.func.grad(loss)(factors), want)
    direction = {n: torch.ones_like(p) for n, p in factors.items()}
    _, along = torch.func.jvp(loss, (factors,), (direction,))
    assert_same_number(along, sum(grad.sum() for grad in want.values()))


# ------------------------------------------------------------------------------------ dropout


def test_dropout_reaches_the_operation_in_training_alone(monkeypatch) -> None:
    ours = alone(lora_dropout=0.25)
    plain = alone()
    seen: list[Any] = []
    op = experts_call.lora_experts

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append([f.p for part in args[3:5] for f in part.factors])
        return op(*args, **kwargs)

    monkeypatch.setattr(experts_call, "lora_experts", record)
    want = numbers(plain)
    assert_same_number(numbers(ours), want)  # in evaluation
    ours.train()
    first, again, other = (numbers(ours, seed=seed) for seed in (1, 1, 2))
    assert seen[1:] == [[0.0, 0.0], *[[0.25, 0.25]] * 3]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["output"], other["output"])
    assert not torch.equal(first["output"], want["output"])
    for wrapper in wrappers(ours):  # everything dropped
        wrapper.lora_dropout["default"].p = 1.0
    with torch.no_grad():
        assert_same_number(ours(ids()), tiny()(ids()))
    grads = numbers(ours)
    assert not any(value.any() for key, value in grads.items() if "lora_" in key)


def test_dropout_without_the_operation_is_an_error() -> None:
    ours = alone(lora_dropout=0.25)
    experts_of(ours).register_forward_hook(lambda *call: None)
    before = snapshot(ours)
    with torch.no_grad():
        assert_same_number(ours(ids()), alone()(ids()))
    ours.train()
    with pytest.raises(RuntimeError, match="lora_dropout of adapter 'default' .* have hooks"):
        ours(ids())
    assert_same(ours.eval(), before)


def test_dropout_is_refused_where_no_call_could_have_it() -> None:
    model = moe.make("llama4")
    before = snapshot(model)
    targets = ["feed_forward.experts.down_proj"]
    config = peftkern.LoraConfig(target_parameters=targets, target_modules=[], lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout != 0 on `down_proj`.*experts interface"):
        peftkern.get_peft_model(model, config)
    assert_same(model, before)
    config = peftkern.LoraConfig(
        target_parameters=["experts.down_proj_bias"], target_modules=[], lora_dropout=0.1
    )
    with pytest.raises(ValueError, match="`down_proj_bias` is not the weight of a linear"):
        peftkern.get_peft_model(tiny("bias"), config)


def test_an_adapter_on_the_biases_keeps_the_sum() -> None:
    settings = {"target_parameters": ["experts.down_proj_bias", "experts.down_proj"]}
    ours, theirs = tiny_pair("bias", **settings)
    assert "`down_proj_bias` is not the weight of a linear" in peftkern.explain(ours)[0].reason
    assert_same_number(numbers(ours), numbers(theirs))
    assert len({*map(id, wrappers(copy.deepcopy(ours)))}) == 2
