"""A module with several names in a model stays one module in every operation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.checkpoint.hotswap import hotswap_adapter
from tests.closeness import assert_same_number, differ
from tests.tiny import assert_same, make, snapshot


class _Shared(nn.Module):
    """``b`` is ``a``, the two blocks are one, and the table is under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4)
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.blocks.append(self.blocks[0])
        self.inner = nn.ModuleDict({"words": self.table, "own": nn.Linear(4, 4)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.inner["words"](ids.flip(1))
        for block in self.blocks:
            x = block(x)
        return self.inner["own"](self.b(self.a(x)))


IDS = torch.arange(8).view(2, 4)


def _base() -> Any:
    return _Shared().double()


def _adapted(**settings: Any) -> Any:
    model = peftkern.get_peft_model(_base(), peftkern.LoraConfig(r=2, **settings))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "tokens_delta")):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.eval()


CASES = {
    "first name": {"target_modules": ["a"]},
    "second name": {"target_modules": ["b"]},
    "both": {"target_modules": ["a", "b"]},
    "pattern": {"target_modules": r"b|inner\.own"},
    "embedding": {"target_modules": ["words"]},
    "shared block": {"target_modules": [r"1.0"]},
    "all-linear": {"target_modules": "all-linear"},
    "in full": {"target_modules": ["own"], "modules_to_save": ["b"]},
    "in full, both": {"target_modules": ["own"], "modules_to_save": ["a", "b"]},
    "tokens": {"target_modules": ["own"], "trainable_token_indices": {"words": [2, 5]}},
    "parameter": {"target_modules": [], "target_parameters": ["b.weight"]},
    "parameter, first": {"target_modules": [], "target_parameters": ["a.weight"]},
}


def _one_each(model: Any) -> None:
    """Every module that the base has twice is there twice, as one."""
    assert model.a is model.b
    assert model.blocks[0][0] is model.blocks[1][0]
    assert model.table is model.inner["words"]


@pytest.mark.parametrize("case", CASES)
def test_it_is_adapted_merged_and_given_back_under_all_names(case: str, tmp_path: Any) -> None:
    base = _base()
    plain = base(IDS)
    model = _adapted(**copy.deepcopy(CASES[case]))
    _one_each(model.base_model.model)
    adapted = model(IDS)
    assert differ(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(model(IDS), plain)
    model.merge_adapter()
    assert_same_number(model(IDS), adapted)
    model.unmerge_adapter()
    assert torch.equal(model(IDS), adapted)
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(_base(), tmp_path)
    assert_same_number(again(IDS), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    _one_each(merged)
    assert_same_number(merged(IDS), adapted)
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in base.named_modules()]
    if "full" not in case:
        _one_each(model.unload())
        assert torch.equal(model.base_model.model(IDS), plain)


def test_its_update_is_that_of_one_weight() -> None:
    """Against the base model with the update in the shared weight itself."""
    model = _adapted(target_modules=["b"])
    reference = _base()
    with torch.no_grad():
        reference.a.weight += model.base_model.model.a.get_delta_weight("default")
    assert_same_number(model(IDS), reference(IDS))


@pytest.mark.parametrize("targets", [["a"], ["a", "b"], "all-linear"])
def test_files_have_the_keys_of_hf_peft(targets: Any, tmp_path: Any) -> None:
    ours = _adapted(target_modules=targets)
    theirs = peft.get_peft_model(_base(), peft.LoraConfig(r=2, target_modules=targets))
    keys = peft.get_peft_model_state_dict(theirs)
    found = peftkern.get_peft_model_state_dict(ours)
    assert found.keys() == keys.keys()
    assert "base_model.model.b.lora_A.default.weight" in ours.state_dict()  # as torch has it
    theirs.save_pretrained(tmp_path / "theirs")
    peftkern.PeftModel.from_pretrained(_base(), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():  # HF PEFT looks for the shared block's tensors twice
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(_base(), tmp_path / "ours")
    for key, value in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(value, found[key])


def test_a_name_that_is_excluded_excludes_the_module() -> None:
    config = peftkern.LoraConfig(r=2, target_modules=["a", "own"], exclude_modules=["b"])
    model = peftkern.get_peft_model(_base(), config).base_model.model
    assert type(model.a) is type(model.b) is nn.Linear
    assert hasattr(model.inner["own"], "lora_A")


@pytest.mark.parametrize("name", ["a", "b", "^b", "blocks.1.0"])
def test_rank_and_alpha_are_given_by_any_name(name: str) -> None:
    config = peftkern.LoraConfig(
        r=4,
        target_modules=["a", "blocks.0.0", "own"],
        rank_pattern={name: 2},
        alpha_pattern={name: 6},
    )
    base = peftkern.get_peft_model(_base(), config).base_model.model  # and no warning
    here, other = base.a, base.blocks[0][0]
    if name.startswith("blocks"):
        here, other = other, here
    assert (here.r, here.scaling) == ({"default": 2}, {"default": 3.0})
    assert other.r == base.inner["own"].r == {"default": 4}


def test_a_swapped_adapter_is_scaled_by_any_name(tmp_path: Any) -> None:
    adapted = _adapted(target_modules=["b"], rank_pattern={"^b": 4})
    adapted.save_pretrained(tmp_path)
    model = _adapted(target_modules=["a"], rank_pattern={"a": 4})
    hotswap_adapter(model, tmp_path, "default")
    assert model.base_model.model.a.scaling == {"default": 2.0}
    assert torch.equal(model(IDS), adapted(IDS))


def test_a_second_adapter_and_its_failure() -> None:
    model = _adapted(target_modules=["a"])
    before = snapshot(model)
    broken = peftkern.LoraConfig(r=2, target_modules=["blocks.1.0", "blocks.0.1"])
    with pytest.raises(ValueError, match="ReLU"):
        model.add_adapter("second", broken)
    assert_same(model, before)
    model.add_adapter("second", peftkern.LoraConfig(r=3, target_modules=["b", "blocks.1.0"]))
    _one_each(model.base_model.model)
    assert model.base_model.model.a.r == {"default": 2, "second": 3}
    model.delete_adapter("second")
    assert torch.equal(model(IDS), _adapted(target_modules=["a"])(IDS))


def test_heads_of_prompts_leave_under_all_names() -> None:
    base = make("llama", "SEQ_CLS")
    base.also = base.score
    config = peftkern.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peftkern.get_peft_model(base, config)
    assert base.also is base.score and hasattr(base.score, "modules_to_save")
    model.delete_adapter("default")
    model.tuner.take_down(model, "default", model.base_model, False)
    assert base.also is base.score and type(base.score) is nn.Linear
