"""Adapters saved as plain LoRA: those whose start changed the base, and those of other ranks."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from torch import nn

import peftkern
from tests.closeness import assert_same_number
from tests.test_weighted import Net, layers, models
from tests.tiny import first, inputs, make, pair

X = torch.arange(12).view(2, 6)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(fan_in_fan_out|changes the base weights|tied layer|`lora_bias=True` was passed"
    "|already a LoRA adapter|Using Rank-Stabilized LoRA with rank_pattern)"
)


def trained(tmp_path, **lora):
    """(base model, model whose PiSSA adapter has been trained); its start is saved in "start"."""
    torch.manual_seed(0)
    base = Net().double()
    settings = {"target_modules": ["emb", "lin", "head"], "r": 3, "init_lora_weights": "pissa"}
    config = peftkern.LoraConfig(**{**settings, **lora})
    model = peftkern.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return base, model


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"lin": 5}, "alpha_pattern": {"head": 1}, "lora_alpha": 4},
        {"init_lora_weights": "olora", "modules_to_save": ["conv"]},
        {"lora_bias": True, "init_lora_weights": True, "target_modules": ["lin", "head"]},
    ],
)
def test_a_start_that_changed_the_base_is_taken_out(tmp_path, doubled, lora):
    base, model = trained(tmp_path, **lora)
    want, before = model(X).detach(), copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    assert model.peft_config["default"].to_dict() == before
    assert list(model.peft_config) == ["default"]
    for package in (peftkern, peft):  # HF PEFT reads it as well
        loaded = package.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain"))
        assert_same_number(loaded(X), want)
        assert loaded.peft_config["default"].r == 6
        assert loaded.peft_config["default"].init_lora_weights is True
        weight = loaded.base_model.model.lin.base_layer.weight
        assert torch.equal(weight, base.lin.weight)
    # through the tuner, with the start beside it
    model.load_adapter(str(tmp_path / "plain"), "other")
    saved = peftkern.get_peft_model_state_dict(model, save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "again")
    model.load_adapter(str(tmp_path / "again"), "same")
    for key, value in model.base_model.subtract_mutated_init(saved, "same").items():
        if "lora_B.bias" in key:
            assert not value.any()
        elif "lora_A" in key:
            assert torch.equal(*value.chunk(2, 0))
        elif "lora_B" in key:
            a, b = value.chunk(2, 1)
            assert torch.equal(a, -b)


@pytest.mark.parametrize(
    "lora, text",
    [
        ({"use_rslora": True, "rank_pattern": {"lin": 2}}, "`rank_pattern` or `alpha_pattern`"),
        ({"use_dora": True, "target_modules": ["lin"]}, "`use_dora=True`"),
        (
            {"target_parameters": ["lin.weight"], "target_modules": [], "init_lora_weights": True},
            "`target_parameters`",
        ),
    ],
)
def test_what_has_no_plain_form_is_refused(tmp_path, doubled, lora, text):
    _, model = trained(tmp_path, **lora)
    with pytest.raises(ValueError, match=re.escape(text)):
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    assert not (tmp_path / "plain").exists()


def test_a_start_of_another_adapter_is_refused(tmp_path, doubled):
    _, model = trained(tmp_path)
    other = peftkern.get_peft_model(
        Net().double(), peftkern.LoraConfig(target_modules=["lin"], r=3)
    )
    other.save_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match="the initial adapter has nothing for"):
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "less"
        )
    plain = peftkern.get_peft_model(
        Net().double(), peftkern.LoraConfig(target_modules=["lin"], init_lora_weights=False)
    )
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="only works for converting a PiSSA"):
        plain.save_pretrained(
            tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path / "plain"
        )
    prompt = peftkern.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peftkern.get_peft_model(make("llama"), prompt)
    with pytest.raises(ValueError, match="is not supported for PROMPT_TUNING"):
        model.save_pretrained(
            tmp_path / "p", path_initial_model_for_weight_conversion=tmp_path / "plain"
        )


# ---------------------------------------------------------------- convert_to_lora


@pytest.mark.parametrize("rank", [2, 0.8, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_rank_gives_peft_s_adapter(family, rank, doubled, tmp_path):
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    double = {"dtype": torch.float64}
    both = pair(family, target_modules=targets, r=8, modules_to_save=["lm_head"], **double)
    with torch.no_grad():
        for model in both:
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    found = []
    for package, model in zip((peftkern, peft), both, strict=True):
        assert model.supports_lora_conversion()
        with pytest.warns(UserWarning, match="already a LoRA adapter"):
            found.append(package.convert_to_lora(model, rank))
    (mine, tensors), (other, theirs) = found
    assert tensors.keys() == theirs.keys()
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
        assert getattr(mine, name) == getattr(other, name), name
    for key in theirs:
        if not key.endswith("lora_A.weight"):
            continue
        last = key.replace("lora_A", "lora_B")
        assert_same_number(tensors[last] @ tensors[key], theirs[last] @ theirs[key], key)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        peftkern.save_as_lora(tmp_path / "x", both[0], rank)
    loaded = peftkern.PeftModel.from_pretrained(make(family, **double), tmp_path / "x")
    batch = inputs(family)
    got = first(loaded(**batch))
    again = peft.PeftModel.from_pretrained(make(family, **double), str(tmp_path / "x"))
    assert_same_number(got, first(again(**batch)))
    if rank == 1.0:
        assert_same_number(got, first(both[0].eval()(**batch)))
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == mine.r


def test_a_variant_is_converted_as_it_computes():
    """HF PEFT forgets DoRA's magnitude."""
    config = peftkern.LoraConfig(
        target_modules=["lin", "conv"], r=2, use_dora=True, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    base = Net().double()
    model = peftkern.get_peft_model(copy.deepcopy(base), config)
    for layer in layers(model).values():
        for p in layer.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.3)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        lora, tensors = peftkern.convert_to_lora(model, 1.0)
    plain = peftkern.get_peft_model(base, lora)
    assert not peftkern.set_peft_model_state_dict(plain, tensors).unexpected_keys
    assert_same_number(plain(X), model(X))


def test_without_a_configuration_and_in_16_bits():
    model = peftkern.get_peft_model(
        Net().to(torch.bfloat16),
        peftkern.LoraConfig(target_modules=["lin"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    inner = model.get_base_model()
    del inner.peft_config
    for rank in (3, 0.9):
        lora, tensors = peftkern.convert_to_lora(inner, rank, progressbar=False)
        assert lora.target_modules == {"lin"}
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        assert set(tensors) == {"lin.lora_A.weight", "lin.lora_B.weight"}


@pytest.mark.parametrize(
    "rank, adapter, error, text",
    [
        (123.0, "a0", ValueError, "It must be between 0 and 1 but got 123.0"),
        (0, "a0", ValueError, "Passing a rank of 0 doesn't make sense"),
        (-3, "a0", ValueError, "Passing a rank of -3 doesn't make sense"),
        (99, "a0", ValueError, "The chosen rank 99 is larger than the weight shape (12)"),
        (2, "no", ValueError, "no adapter named 'no'"),
    ],
)
def test_errors(rank, adapter, error, text):
    ours, _ = models({"r": 4}, targets=["lin"])
    with pytest.raises(error, match=re.escape(text)):
        peftkern.convert_to_lora(ours, rank, adapter)


def test_what_cannot_be_converted():
    with pytest.raises(TypeError, match="Could not detect any layer that supports"):
        peftkern.convert_to_lora(nn.Linear(2, 2), 2)
    prompt = peftkern.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peftkern.get_peft_model(make("llama"), prompt)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="Could not detect any layer that supports"):
        peftkern.convert_to_lora(model, 2)
    ours, theirs = models({"r": 4})
    for package, m in ((peftkern, ours), (peft, theirs)):
        assert not m.supports_lora_conversion()
        with pytest.raises(TypeError, match="Some module types on this model do not support"):
            package.convert_to_lora(m, 2, "a0")
    for how in ({"bias": "all"}, {"lora_bias": True}):
        ours, _ = models({"r": 4, **how}, targets=["lin"])
        with pytest.raises(ValueError, match="The adapter's config sets"):
            peftkern.convert_to_lora(ours, 2, "a0")
