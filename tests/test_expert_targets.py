"""``target_parameters="all-experts"``, the line about experts left out, wrong names."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.tuners.lora.expert_targets import find_experts, short_names
from peftkern.tuners.lora.parameter import ParamWrapper
from peftkern.tuners.lora.parameter_targets import Target
from tests import expert_families, moe
from tests.closeness import assert_same_number
from tests.expert_families import COMPARED, E, experts_of, gradients, outputs
from tests.tiny import assert_same, fill, snapshot
from tests.tiny import make as make_tiny

ALL = "all-experts"
NAMES = {
    "granitemoe": ["block_sparse_moe.experts.down_proj", "block_sparse_moe.experts.gate_up_proj"],
    "nemotron_h": ["mixer.experts.down_proj", "mixer.experts.up_proj"],
}


def names_in(family: str) -> list[str]:
    return NAMES.get(family, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])


def adapted(family: str, **settings: Any) -> Any:
    config = peftkern.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], **settings})
    model = peftkern.get_peft_model(expert_families.make(family), config)
    fill(model)
    return model


@pytest.mark.parametrize("family", COMPARED)
def test_all_experts_of_a_family_are_hf_pefts_list(family: str, tmp_path: Path) -> None:
    ours = adapted(family, target_parameters=ALL)
    wrappers = [m for m in ours.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 2 * len(experts_of(expert_families.make(family)))
    assert {w.num_experts for w in wrappers} == {E}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": []}
    theirs = peft.get_peft_model(
        expert_families.make(family),
        peft.LoraConfig(target_parameters=names_in(family), **settings),
    )
    fill(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same_number(gradients(ours), gradients(theirs))

    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == names_in(family)
    card = (tmp_path / "README.md").read_text()
    assert f"- `target_parameters`: {', '.join(names_in(family))}\n" in card
    assert "`target_modules`" not in card
    want = outputs(ours)
    assert (want - outputs(expert_families.make(family))).abs().max() > 1e-2
    for library in (peft, peftkern):
        again = library.PeftModel.from_pretrained(expert_families.make(family), tmp_path)
        assert_same_number(outputs(again), want)


def test_the_short_form_goes_with_modules_and_in_every_entry(tmp_path: Path) -> None:
    names = names_in("qwen3_moe")
    ours = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters="All-Experts")
    config = ours.peft_config["default"]
    assert config.target_parameters == names and config.to_dict()["target_parameters"] == names
    assert any(".q_proj.lora_A" in name for name, _ in ours.named_parameters())
    # a second adapter, and one of a configuration that was not resolved yet, from a file
    ours.add_adapter("other", peftkern.LoraConfig(r=2, target_modules=[], target_parameters=ALL))
    assert ours.peft_config["other"].target_parameters == names
    unresolved = peftkern.LoraConfig(target_modules=[], target_parameters=ALL)
    unresolved.save_pretrained(tmp_path)
    read = peftkern.PeftConfig.from_pretrained(tmp_path)
    assert read.target_parameters == ALL
    model = peftkern.inject_adapter_in_model(read, expert_families.make("qwen3_moe"))
    assert sum(isinstance(m, ParamWrapper) for m in model.modules()) == 4
    # the architecture's defaults come too, as with a list
    model = adapted("mixtral", target_modules=None, target_parameters=ALL)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_a_second_adapter_takes_the_names_of_the_first() -> None:
    given = ["experts.gate_up_proj", "down_proj"]
    ours = adapted("qwen3_moe", target_parameters=given)
    ours.add_adapter("other", peftkern.LoraConfig(target_modules=[], target_parameters=ALL))
    assert set(ours.peft_config["other"].target_parameters) == set(given)
    ours = adapted("qwen3_moe", target_parameters=["experts.down_proj"])
    before = snapshot(ours)
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        ours.add_adapter("other", peftkern.LoraConfig(target_modules=[], target_parameters=ALL))
    assert_same(ours, before)


def test_the_short_form_beside_all_linear_is_a_list_beside_it() -> None:
    """Which names the experts again, where these were linear layers before transformers 5."""
    models = []
    for library, asked in ((peftkern, ALL), (peft, names_in("qwen3_moe"))):
        config = library.LoraConfig(target_modules="all-linear", target_parameters=asked)
        models.append(library.get_peft_model(expert_families.make("qwen3_moe"), config))
    ours, theirs = models
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    got, want = (m.peft_config["default"] for m in models)
    assert set(got.target_parameters) == set(want.target_parameters)
    assert {t.shape for t in ours.parameters()} == {t.shape for t in theirs.parameters()}


def test_models_without_experts_of_the_interface_are_refused_unchanged() -> None:
    for model, says in (
        (make_tiny("llama"), "no module of LlamaForCausalLM is of transformers' interface"),
        (moe.make("llama4"), r"It has \['feed_forward.experts.down_proj', .* of Llama4TextExperts"),
    ):
        before = snapshot(model)
        config = peftkern.LoraConfig(target_modules=["q_proj"], target_parameters=ALL)
        with pytest.raises(ValueError, match=says):
            peftkern.get_peft_model(model, config)
        assert_same(model, before)
    with pytest.raises(TypeError, match="a list of strings or None. .* 'all-experts', got 'some'"):
        peftkern.LoraConfig(target_parameters="some")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.ones(1, 4, 4))


class Beside(nn.Module):
    """Experts of the interface, a 3-D parameter of others, and a convolution named after them."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = expert_families.make("qwen3_moe").model.layers[0].mlp.experts
        self.experts = inner
        self.shared_experts = Shared()
        self.expert_conv = nn.Conv1d(2, 2, 3)


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Beside()
    found = find_experts(model)
    assert [t.key for t in found.inside] == ["experts.gate_up_proj", "experts.down_proj"]
    assert [t.key for t in found.outside] == ["shared_experts.gate_proj"]
    config = peftkern.LoraConfig(target_modules=[], target_parameters=ALL)
    with caplog.at_level(logging.WARNING, "peftkern"):
        peftkern.inject_adapter_in_model(config, model)
    (line,) = caplog.messages
    assert "leaves out ['shared_experts.gate_proj'] of Shared," in line


def test_short_names_match_nothing_else() -> None:
    keys = ["a.0.x.w", "a.1.x.w", "b.w", "c.0.x.v", "d.x.v"]
    wanted = [Target(*key.rsplit(".", 1), key) for key in keys]
    # d.x.v ends with what c.0.x.v is called after its layer's number
    assert short_names([*wanted[:2], wanted[3]], keys) == ["c.0.x.v", "x.w"]
    assert short_names(wanted[2:3], keys) == ["b.w"]


# -------------------------------------------------------------------- the line


@pytest.mark.parametrize(
    "family, settings, says",
    [
        ("gpt_oss", {"target_modules": "all-linear"}, True),
        ("granitemoe", {"target_modules": "all-linear"}, True),
        ("qwen3_moe", {"target_modules": ["q_proj"]}, True),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["gate.weight"]}, True),
        # here "all-linear" adapts the experts, as in HF PEFT: they were linear layers
        ("qwen3_moe", {"target_modules": "all-linear"}, False),
        ("gpt_oss", {"target_modules": "all-linear", "target_parameters": ALL}, False),
        ("gpt_oss", {"target_modules": [], "target_parameters": ["experts.down_proj"]}, False),
    ],
    ids=str,
)
def test_one_line_says_how_to_adapt_experts_that_are_left_out(
    family: str, settings: Any, says: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, "peftkern"):
        ours = adapted(family, **settings)
        if says:
            (line,) = caplog.messages
            assert f"target_parameters={names_in(family)} (or 'all-experts')" in line
            assert "\n" not in line
        # neither a further adapter nor loading repeats it
        ours.add_adapter("other", peftkern.LoraConfig(**settings))
        ours.save_pretrained(tmp_path)
        peftkern.PeftModel.from_pretrained(expert_families.make(family), tmp_path)
    assert len(caplog.messages) == says
    # what it names can be given to HF PEFT
    config = peft.LoraConfig(target_modules=[], target_parameters=names_in(family))
    peft.get_peft_model(expert_families.make(family), config)


def test_all_linear_adapts_what_hf_peft_adapts() -> None:
    for family in COMPARED:
        keys = []
        for library in (peftkern, peft):
            config = library.LoraConfig(target_modules="all-linear")
            keys.append(
                library.get_peft_model(expert_families.make(family), config).state_dict().keys()
            )
        assert keys[0] == keys[1], family


def test_nothing_is_said_of_models_without_experts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "peftkern"):
        peftkern.get_peft_model(make_tiny("llama"), peftkern.LoraConfig(target_modules=["q_proj"]))
    assert not caplog.messages


# -------------------------------------------------------------------- names that do not fit


@pytest.mark.parametrize("modules", [[], None])
def test_names_of_no_parameter_are_refused_with_those_that_are(modules: Any) -> None:
    for family in ("qwen3_moe", "mixtral"):  # the second has default modules
        model = expert_families.make(family)
        before = snapshot(model)
        config = peftkern.LoraConfig(
            target_modules=modules, target_parameters=["mlp.experts.w1", "no"]
        )
        with pytest.raises(
            ValueError,
            match=r"names \['mlp.experts.w1', 'no'\], which no parameter of \w+ is called.*"
            r"target_parameters=\['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'\] "
            r"\(or 'all-experts'\)",
        ):
            peftkern.get_peft_model(model, config)
        assert_same(model, before)


def test_hf_pefts_warning_says_more_where_modules_match() -> None:
    config = peftkern.LoraConfig(target_modules=["q_proj"], target_parameters=["no.weight"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched.*all-experts"):
        peftkern.get_peft_model(expert_families.make("qwen3_moe"), config)
    config = peftkern.LoraConfig(target_modules=[], target_parameters=["down_proj", "up_proj"])
    with pytest.warns(RuntimeWarning, match=r"names \['up_proj'\], which no parameter of"):
        peftkern.get_peft_model(expert_families.make("qwen3_moe"), config)


def test_parameters_of_one_dimension_or_four_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Conv2d(2, 3, 5)

    for name, shape in (("experts.bias", r"\(3,\)"), ("experts.weight", r"\(3, 2, 5, 5\)")):
        model = Odd()
        before = snapshot(model)
        config = peftkern.LoraConfig(target_modules=[], target_parameters=[name])
        with pytest.raises(ValueError, match=f"only 2d and 3d .* names '{name}', of shape {shape}"):
            peftkern.get_peft_model(model, config)
        assert_same(model, before)


def test_a_parameter_that_is_named_twice_is_adapted_once() -> None:
    twice = ["down_proj", "mlp.experts.down_proj", "down_proj"]
    ours, theirs = (
        library.get_peft_model(
            expert_families.make("olmoe"),
            library.LoraConfig(target_modules=[], target_parameters=twice),
        )
        for library in (peftkern, peft)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert sum(isinstance(m, ParamWrapper) for m in ours.modules()) == 2


# -------------------------------------------------------------------- dtypes and status


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_counts_and_status_are_hf_pefts(dtype: Any, autocast: bool, capsys: Any) -> None:
    found = []
    for library in (peftkern, peft):
        base = expert_families.make("gpt_oss").to(dtype)
        settings = {"target_modules": ["q_proj"], "target_parameters": names_in("gpt_oss")}
        model = library.get_peft_model(
            base, library.LoraConfig(**settings), autocast_adapter_dtype=autocast
        )
        model.add_adapter("other", library.LoraConfig(**settings))
        model.print_trainable_parameters()
        status = model.get_model_status()
        layers = [
            {k: v for k, v in vars(layer).items() if k != "module_type"}
            for layer in model.get_layer_status()
        ]
        found.append(
            (
                {n: p.dtype for n, p in model.named_parameters()},
                model.get_nb_trainable_parameters(),
                capsys.readouterr().out,
                {k: v for k, v in vars(status).items() if k != "adapter_model_type"},
                layers,
                {n: p.dtype for n, p in model.half().named_parameters()},
            )
        )
    ours, theirs = found
    assert ours == theirs


def test_nothing_warns_while_experts_are_adapted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("olmoe", target_parameters=ALL)
