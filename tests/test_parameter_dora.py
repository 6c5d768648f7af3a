"""DoRA on parameters, which HF PEFT refuses: numbers, gradients, several adapters, what runs."""

from __future__ import annotations

import logging

import pytest
import torch

import peftkern
from peftkern.ops.dora_norm import expert_norms
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.moe_models import adapt, fused, ids, numbers, tiny, wrappers
from tests.parameter_dora import (
    BASES,
    CONV1D,
    DORA,
    LINEAR,
    every,
    formula,
    made,
    trained,
    with_plain,
)
from tests.tiny import fill

# ------------------------------------------------------------------------------- numbers


@every
def test_numbers_and_gradients_are_the_formulas(base: str) -> None:
    model = made(base)
    want = formula(model, base)
    assert sum("lora_magnitude_vector" in name for name in want) == len(BASES[base][1])
    assert_same_number(trained(model.train()), want)
    assert differ(want["output"], BASES[base][0]()(ids()).detach())


@every
@pytest.mark.parametrize("init", [True, False])
def test_it_starts_as_lora_without_magnitudes(base: str, init: bool) -> None:
    make, targets = BASES[base]
    models = []
    for use_dora in (True, False):
        torch.manual_seed(1)
        settings = {"init_lora_weights": init, "target_parameters": targets, "target_modules": []}
        config = peftkern.LoraConfig(r=3, use_dora=use_dora, **settings)
        models.append(peftkern.get_peft_model(make(), config))
    dora, lora = models
    with torch.no_grad():
        assert_same_number(dora(ids()), lora(ids()))
        assert differ(dora(ids()), make()(ids())) != init
    more = dora.get_nb_trainable_parameters()[0] - lora.get_nb_trainable_parameters()[0]
    sizes = [w.lora_magnitude_vector["default"].weight.shape for w in wrappers(dora)]
    assert more == sum(size.numel() for size in sizes)
    outputs = [(w.num_experts, w.out_features) for w in wrappers(dora)]
    if base == "conv1d":
        assert sizes == [(10,)]
    else:
        assert sizes == [(E, N) if E > 1 else (N,) for E, N in outputs]


@every
@pytest.mark.parametrize(
    "names", [["more", "dora"], ["plain", "dora"], ["dora", "plain", "more"], ["plain"]], ids=str
)
def test_several_adapters_are_one_after_the_other(base: str, names: list[str]) -> None:
    model = with_plain(base)
    model.base_model.set_adapter(names)
    want = formula(model, base)
    found = trained(model)
    assert want.keys() == found.keys()
    assert_same_number(found, want)


def test_several_adapters_are_as_those_of_a_lora_linear() -> None:
    """Parameters have the linear's rule, with dropout too."""
    found = []
    for targets in (
        {"target_modules": ["1"]},
        {"target_modules": [], "target_parameters": ["1.weight"]},
    ):
        settings = {"lora_dropout": 0.4, **DORA, **targets}
        model = adapt(peftkern, LINEAR(), ("default", "other"), **settings)
        for names in ("default", ["other", "default"]):
            model.base_model.set_adapter(names)
            found.append((numbers(model.train()), numbers(model.eval())))
    assert_same_number(found[2:], found[:2])
    assert differ(found[0][0]["output"], found[0][1]["output"])


def test_dropout_on_a_conv1d_is_that_of_a_lora_linear() -> None:
    """A linear's dropout drops inputs; the parameter's factors stand the other way round."""
    names = {"lora_A": "lora_B", "lora_B": "lora_A"}
    settings = {"lora_dropout": 0.4, **DORA}
    linear = adapt(peftkern, CONV1D(), target_modules=["1"], fan_in_fan_out=True, **settings)
    model = adapt(peftkern, CONV1D(), target_parameters=["1.weight"], **settings)
    ours, theirs = wrappers(model)[0], linear.base_model.model[1]
    with torch.no_grad():
        for here, there in names.items():
            getattr(ours, here)["default"].weight.copy_(
                getattr(theirs, there)["default"].weight.t()
            )
        magnitude = theirs.lora_magnitude_vector["default"].weight
        ours.lora_magnitude_vector["default"].weight.copy_(magnitude)
    got, want = numbers(model.train()), numbers(linear.train())
    assert_same_number(got["output"], want["output"])
    for here, there in names.items():
        key = "base_model.model.1.{}.default.weight"
        assert_same_number(got[key.format(here)], want[key.format(there)].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["transposed", "linear"])
def test_other_dtypes_are_as_good_as_torchs(base: str, dtype: torch.dtype) -> None:
    make, targets = BASES[base]
    config = peftkern.LoraConfig(r=3, target_modules=[], target_parameters=targets, **DORA)
    model = peftkern.get_peft_model(make().to(dtype), config, autocast_adapter_dtype=False)
    fill(model)
    exact = formula(model, base)
    assert_as_good_as_torch(trained(model), formula(model, base, dtype), exact)


def test_the_gain_itself_is_not_rounded_to_a_narrow_dtype() -> None:
    gain = 1 + 3 * 2.0**-10  # 1 in bfloat16; times some of bfloat16's numbers it is their successor
    wrapper = wrappers(made("outside"))[0]
    W, m = wrapper.get_param(), wrapper.lora_magnitude_vector["default"].weight
    W.data = W.data.bfloat16()
    wrapper.lora_B["default"].weight.data.zero_()
    m.data.copy_(W.data.double().norm(dim=2) * gain)
    before = W.data.clone()
    with wrapper._activate_lora(["default"]), torch.no_grad():
        seen = wrapper.get_param()
        assert seen.dtype is torch.bfloat16
        assert torch.equal(seen.double(), (before.double() * gain).bfloat16().double())
        assert not torch.equal(seen, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_experts(transposed: bool) -> None:
    """One expert after the other, or in one product for a compiler's graph."""
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=g).double() for s in ((3, 7, 5), (3, 2, 5), (3, 7, 2)))
    want = torch.stack([(W[e] + 0.5 * B[e] @ A[e]).norm(dim=1) for e in range(3)])
    given = W.mT.contiguous() if transposed else W
    compiled = torch.compile(expert_norms, backend="eager", fullgraph=True)
    for call in (expert_norms, compiled):
        found = call(given, A.requires_grad_(), B, 0.5, transposed)
        assert not found.requires_grad
        assert_same_number(found, want.detach())


# ------------------------------------------------------------------------------- one mixture


def test_one_parameter_with_dora_and_the_other_without() -> None:
    """Active adapters that differ between the wrappers of one module."""
    model = with_plain("plain")
    outer, inner = wrappers(model)
    for first, second in (("dora", "plain"), ("plain", "dora")):
        outer.set_adapter([first])
        inner.set_adapter([second])
        assert_same_number(trained(model), formula(model, "plain"))
        assert fused(model) == [False, False]
    outer.set_adapter(["plain"])
    inner.set_adapter(["plain"])
    assert fused(model) == [True, True]
    assert_same_number(trained(model), formula(model, "plain"))


def test_explain_and_one_line_in_the_log_say_why(caplog) -> None:
    model = with_plain("plain")
    model.base_model.set_adapter("dora")
    for row in peftkern.explain(model):
        assert not row.fused and "adapter 'dora' has DoRA" in row.reason
        assert "m / ‖W + scaling · B A‖ · (W + scaling · B A)" in row.reason
    with caplog.at_level(logging.INFO):
        model(ids())
        model(ids())
    assert len([r for r in caplog.records if "has DoRA" in r.getMessage()]) == 1
    (row,) = peftkern.explain(made("linear"))
    assert row.fused and row.reason == "DoRA: one operation"
    model = made("linear", ("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    (row,) = peftkern.explain(model)
    assert not row.fused and "several adapters are active" in row.reason


def test_rows_of_a_batch_may_name_the_adapters_without_dora() -> None:
    model = with_plain("plain")
    with torch.no_grad():
        rows = model(ids(), adapter_names=["plain", "__base__", "plain"])
        assert_same_number(rows[1:2], tiny()(ids())[1:2])
        with pytest.raises(ValueError, match="mixed adapter batches here: .*'more' has DoRA"):
            model(ids(), adapter_names=["plain", "more", "plain"])
        model.base_model.set_adapter("plain")
        assert_same_number(rows[::2], model(ids())[::2])
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
            made("linear")(ids(), adapter_names=["default", "__base__", "default"])
