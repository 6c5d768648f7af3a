"""The rest of the reasons for which experts are not one operation, each with equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import peftkern
from peftkern.ops.experts import choosing, grouped, triton_way
from peftkern.ops.experts.parts import Call
from peftkern.tuners.lora import experts, experts_call
from peftkern.tuners.lora.expert_targets import find_experts
from tests import moe_models
from tests.closeness import assert_same_number
from tests.mixtures import Mixture, mixture
from tests.moe_models import alone, experts_of, fused, ids, tiny, wrappers

ALL = "all-experts"


def _parameter(model: Any, name: str, change: Callable[[Any], Any]) -> None:
    holder = experts_of(model)
    setattr(holder, name, nn.Parameter(change(getattr(holder, name)), requires_grad=False))


def _weight_of_a(model: Any, change: Callable[[Any], Any]) -> None:
    a = wrappers(model)[0].lora_A["default"]
    a.weight = change(a.weight)


class Alike(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Marked(nn.Parameter):
    pass


# {name: (kind of experts, a change of a model, the reason)}
REASONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "two dtypes": (
        "plain",
        lambda m: _parameter(m, "down_proj", torch.Tensor.float),
        "dtypes: torch.float64 and torch.float32",
    ),
    "a bias of another dtype": (
        "bias",
        lambda m: _parameter(m, "down_proj_bias", torch.Tensor.float),
        "dtypes: weights torch.float64, biases torch.float32",
    ),
    "eight bits": (
        "plain",
        lambda m: _parameter(m, "gate_up_proj", lambda t: t.to(torch.float8_e4m3fn)),
        "gate_up_proj is torch.float8_e4m3fn",
    ),
    "a flat bias": (
        "bias",
        lambda m: _parameter(m, "gate_up_proj_bias", torch.Tensor.flatten),
        "gate_up_proj_bias has 1 dimensions (its shape is [160])",
    ),
    "a trained norm": (
        "post_norm",
        lambda m: experts_of(m).post_expert_norm.requires_grad_(True),
        "a parameter of post_expert_norm requires a gradient",
    ),
    "a hook on dropout": (
        "plain",
        lambda m: wrappers(m)[0].lora_dropout["default"].register_forward_hook(lambda *a: None),
        "lora_dropout has hooks",
    ),
    "A of two dtypes": (
        "plain",
        lambda m: wrappers(m)[0].lora_A["default"].float(),
        "dtypes: lora_A torch.float32, lora_B torch.float64",
    ),
    "A of a subclass": (
        "plain",
        lambda m: _weight_of_a(m, Marked),
        "the weight of lora_A is a Marked, not a plain Parameter",
    ),
    "A on meta": (
        "plain",
        lambda m: _weight_of_a(m, lambda t: nn.Parameter(t.to("meta"))),
        "the weight of lora_A is on the meta device",
    ),
    "a parametrized A": (
        "plain",
        lambda m: parametrize.register_parametrization(
            wrappers(m)[0].lora_A["default"], "weight", Alike()
        ),
        "lora_A is a ParametrizedLinear, not an nn.Linear",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_explain_tells(name: str) -> None:
    kind, change, reason = REASONS[name]
    if kind not in moe_models.FLAGS:
        pytest.skip("transformers has no norm after experts")
    model = alone(kind=kind)
    assert all(fused(model))
    change(model)
    for row in peftkern.explain(model):
        assert not row.fused and reason in row.reason, row.reason


def test_global_hooks() -> None:
    model = alone()
    want = model(ids())
    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, *rest: seen.append(module))
    try:
        assert "torch has global module hooks" in peftkern.explain(model)[0].reason
        assert_same_number(model(ids()), want)
        assert experts_of(model) in seen
    finally:
        handle.remove()
    assert all(fused(model))


def _call(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, 4 * moe_models.WIDTH, dtype=dtype).view(4, -1)
    index, weights = torch.tensor([[0, 1]] * 4), torch.ones(4, 2, dtype=torch.float64)
    return {"hidden_states": x, "top_k_index": index, "top_k_weights": weights}


# {name: (a call's tensors, the reason)}; explain cannot know of it
CALLS = {
    "dtype": (_call(torch.float32), "dtypes: tokens torch.float32, experts torch.float64"),
    "no choices": (
        {**_call(), "top_k_index": torch.tensor([0, 1, 2, 3])},
        "the experts are called with other arguments",
    ),
    "another name": ({"x": torch.ones(4, 8)}, "the experts are called with other arguments"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_not_one_operation(name: str) -> None:
    given, reason = CALLS[name]
    model = alone()
    outer = wrappers(model)[0]
    assert all(fused(model))
    assert experts_call.run(outer, (), given) == reason
    with pytest.raises(ValueError, match=f"mixed adapter batches here: {reason}"):
        outer(**given, adapter_names=["default"] * 4)


def test_arguments_by_name() -> None:
    outer, given = wrappers(alone())[0], _call()
    found = experts_call.run(outer, (), dict(reversed(given.items())))
    assert_same_number(found, outer(*given.values()))


def test_a_name_without_weights_here() -> None:
    model = alone(("default", "other"))
    for wrapper in wrappers(model):
        wrapper.delete_adapter("other")
    model.base_model.set_adapter("other")
    assert {row.reason for row in peftkern.explain(model)} == {"no active adapter has weights here"}
    assert_same_number(model(ids()), tiny()(ids()))


def test_calls_apart_leave_nothing_behind() -> None:
    """Each call parametrizes the experts, which makes a class; none of them may be kept."""
    model = alone()
    experts_of(model).register_forward_hook(lambda *call: None)
    with torch.no_grad():
        model(ids())
        before = len(experts._forms)
        for _ in range(3):
            model(ids())
    assert len(experts._forms) == before


def test_all_experts_are_those_that_can_be_one_operation() -> None:
    """A class that inherits the interface's flags and has its own forward is outside of it."""
    model = tiny()

    class Own(type(model.experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    assert len(find_experts(model).inside) == 2
    model.experts.__class__ = Own
    found = find_experts(model)
    assert not found.inside and len(found.outside) == 2
    config = peftkern.LoraConfig(target_modules=[], target_parameters=ALL)
    with pytest.raises(ValueError, match="'experts.down_proj', 'experts.gate_up_proj'.*of Own"):
        peftkern.get_peft_model(model, config)


# ------------------------------------------------------------------------- within the operation


def _many(count: int) -> Mixture:
    return mixture(ranks=((1,) * count, (1,) * count), mixed=True, dtype=torch.float32)


BY_TORCH: dict[str, tuple[Callable[[], Mixture], bool, str]] = {
    "several": (
        lambda: mixture(ranks=((3, 1), (2,)), dtype=torch.float32),
        True,
        "several adapters are added to one linear",
    ),
    "mixed, with gradients": (
        lambda: _many(2),
        True,
        "gradients are wanted for a batch of several adapters",
    ),
    "mixed, with dropout": (
        lambda: mixture(ranks=((1, 2), (2, 1)), mixed=True, p=0.5, dtype=torch.float32),
        False,
        "a batch of several adapters has dropout",
    ),
    "many": (lambda: _many(64), False, "64 adapters are in a batch, and 63 are the most"),
}


@pytest.mark.parametrize("name", BY_TORCH)
def test_what_the_kernels_do_not_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, keep, reason = BY_TORCH[name]
    monkeypatch.setattr(triton_way, "refusal", lambda *facts: None)  # of the device and its dtypes
    monkeypatch.setattr(triton_way, "elsewhere", lambda x: False)
    made = Call(*make(), False)
    assert triton_way.why_not(made, keep) == reason
    assert triton_way.why_not(Call(*mixture(dtype=torch.float32), False), keep) is None
    with peftkern.use_backend("torch"):
        assert choosing.choose(made, keep).name == "loop"


def test_what_torchs_grouped_product_does_not_take() -> None:
    half = Call(*mixture(dtype=torch.float16, sizes=(4, 8, 16, 8, 3, 2)), False)
    assert grouped.why_not(half) is None
    narrow = Call(*mixture(dtype=torch.float16, sizes=(4, 8, 16, 6, 3, 2)), False)
    assert "down's weight is [3, 6, 16] in torch.float16" in str(grouped.why_not(narrow))
    double = Call(*mixture(dtype=torch.float64), False)
    assert grouped.why_not(double) == "torch has no grouped product of torch.float64"
