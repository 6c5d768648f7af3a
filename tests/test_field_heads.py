"""After other calls, an adapter uses and trains the right head and the right single tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from tests.closeness import assert_same_number, differ
from tests.prompts import config_of, prompt_model
from tests.tiny import inputs, make

BATCH = {k: v for k, v in inputs("llama", "SEQ_CLS").items() if k != "labels"}


def _randomised(model: nn.Module) -> Any:
    """Different numbers in everything that any adapter trains."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "tokens_delta")):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.eval()


def _lora(**settings: Any) -> peftkern.LoraConfig:
    return peftkern.LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def _trains(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _two(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """A classifier with the adapters "a", which is active, and "b"."""
    model = make("llama", "SEQ_CLS", torch.float64)
    model = peftkern.get_peft_model(model, _lora(**first), adapter_name="a")
    model.add_adapter("b", _lora(**second))
    return _randomised(model)


HEAD = {"modules_to_save": ["score"]}
TOKENS = {"trainable_token_indices": [5, 9, 30]}

# -------------------------------------------------------------------- deleting what is active


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, HEAD),
        ({}, TOKENS),
        ({}, {**HEAD, **TOKENS}),
        (HEAD, HEAD),
        (TOKENS, {"trainable_token_indices": [7]}),
        (HEAD, TOKENS),
        # no layer has both
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], **HEAD, **TOKENS}),
        ({"target_modules": ["v_proj"]}, {"target_modules": ["q_proj"], **HEAD}),
    ],
)
def test_the_next_adapter_is_active_with_all_that_it_trains(first: Any, second: Any) -> None:
    model = _two(first, second)
    other = copy.deepcopy(model)
    other.set_adapter("b")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert_same_number(_logits(model), _logits(other))
    assert _trains(model) == [n for n in _trains(other) if ".a." not in n]
    assert differ(_logits(model), make("llama", "SEQ_CLS", torch.float64)(**BATCH).logits)


def test_deleting_what_is_not_active_changes_nothing() -> None:
    model = _two(HEAD, {**HEAD, **TOKENS})
    before, trains = _logits(model), _trains(model)
    model.delete_adapter("b")
    assert model.active_adapter == "a"
    assert torch.equal(_logits(model), before) and _trains(model) == trains


def test_one_of_two_active_adapters_leaves_the_other_with_its_head() -> None:
    model = _two({}, HEAD)
    model.base_model.set_adapter(["a", "b"])
    other = copy.deepcopy(model)
    other.set_adapter("b")
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert_same_number(_logits(model), _logits(other))


def test_without_any_adapter_the_model_is_the_base_model() -> None:
    model = _two({}, {**HEAD, **TOKENS})
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    model.delete_adapter("b")
    assert model.active_adapters == []
    base = make("llama", "SEQ_CLS", torch.float64)
    assert torch.equal(_logits(model), _logits(base))
    assert _trains(model) == []


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_next_prompt_is_active_with_its_head(kind: str) -> None:
    base = make("llama", "SEQ_CLS", torch.float64)
    model = prompt_model(peftkern, kind, "llama", "SEQ_CLS", base=base, adapter_name="a")
    model.add_adapter("b", config_of(peftkern, kind, "SEQ_CLS"))
    _randomised(model)
    other = copy.deepcopy(model)
    other.set_adapter("b")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert torch.equal(_logits(model), _logits(other))
    assert _trains(model) == [n for n in _trains(other) if not n.endswith(".a.embedding.weight")]


# -------------------------------------------------------------------- merging what is not active


def _prompted_by(model: Any, name: str) -> torch.Tensor:
    other = copy.deepcopy(model)
    other.set_adapter(name)
    return _logits(other)


@pytest.mark.parametrize("second", [HEAD, TOKENS, {**HEAD, **TOKENS}, {}])
@pytest.mark.parametrize("first", [HEAD, {}, {**HEAD, "trainable_token_indices": [7]}])
def test_a_named_adapter_is_merged_with_its_own_head(first: Any, second: Any) -> None:
    model = _two(first, second)
    expected, before = _prompted_by(model, "b"), _logits(model)
    model.merge_adapter(adapter_names=["b"])
    assert_same_number(_logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(_logits(model), before)
    merged = model.merge_and_unload(adapter_names=["b"])
    assert_same_number(_logits(merged), expected)


def test_what_is_merged_keeps_its_head_until_it_is_taken_out() -> None:
    model = _two(HEAD, HEAD)
    expected = _prompted_by(model, "b")
    base = make("llama", "SEQ_CLS", torch.float64)
    model.merge_adapter(adapter_names=["b"])
    assert torch.equal(model.base_model.model.score.weight, _copy_of(model, "b"))
    assert_same_number(_logits(copy.deepcopy(model).unload()), expected)
    other = copy.deepcopy(model)
    with other.disable_adapter():
        assert_same_number(_logits(other), _logits(base))
    assert_same_number(_logits(other), _prompted_by(_two(HEAD, HEAD), "a"))
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("a")
    assert_same_number(_logits(model), _prompted_by(_two(HEAD, HEAD), "a"))


def _copy_of(model: Any, name: str) -> torch.Tensor:
    return model.base_model.model.score.modules_to_save[name].weight


def test_of_several_merged_adapters_the_active_one_has_its_head() -> None:
    model = _two(HEAD, HEAD)
    model.merge_adapter(adapter_names=["b", "a"])
    assert torch.equal(model.base_model.model.score.weight, _copy_of(model, "a"))


def test_two_heads_of_inactive_adapters_are_refused() -> None:
    model = _two(HEAD, HEAD)
    model.add_adapter("c", _lora())
    model.set_adapter("c")
    before, names = _logits(model), list(model.state_dict())
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"`adapter_names`: \['a', 'b'\] have each trained"):
            call(adapter_names=["a", "b"])
        assert torch.equal(_logits(model), before) and list(model.state_dict()) == names


def test_a_broken_head_is_not_merged_safely() -> None:
    model = _two(HEAD, HEAD)
    with torch.no_grad():
        _copy_of(model, "b")[0, 0] = torch.nan
    before = _logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="adapter b seems to be broken"):
            call(adapter_names=["b"], safe_merge=True)
        assert torch.equal(_logits(model), before)
    model.merge_adapter(adapter_names=["a"], safe_merge=True)
