"""Generation with several sequences a row, and what a classifier reads behind a prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from tests.prompts import config_of, prompt_model
from tests.tiny import fill, make

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
NAMES = ["b", "default", "b"]
# one choice a step, so that sampling is what greedy search is
SAMPLING = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}


def _lora_model(family: str, task: str = "CAUSAL_LM") -> Any:
    def config() -> peftkern.LoraConfig:
        targets = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
        return peftkern.LoraConfig(r=4, task_type=task, target_modules=targets)

    base = make(family, task, torch.float64)
    with torch.no_grad():
        for parameter in base.parameters() if family == "t5" else ():
            parameter.normal_(std=0.4)  # as made it says the same whatever it is asked
    model = peftkern.get_peft_model(base, config())
    model.add_adapter("b", config())
    fill(model)
    return model.eval()


def _prompts_model(kind: str) -> Any:
    base = make("llama", "CAUSAL_LM", torch.float64)
    model = prompt_model(peftkern, kind, "llama", base=base)
    model.add_adapter("b", config_of(peftkern, kind))
    with torch.no_grad():
        for name, parameter in model.prompt_encoder.named_parameters():
            parameter.normal_(std=2.0 if name.startswith("b") else 1.0)
    return model.eval()


def _model(kind: str) -> Any:
    if kind in ("llama", "t5"):
        return _lora_model(kind, "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM")
    return _prompts_model(kind)


def _generate(model: Any, ids: Tensor, *args: Any, **kwargs: Any) -> list[list[int]]:
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    if args:
        return model.generate(ids, *args, attention_mask=how["attention_mask"]).tolist()
    return model.generate(input_ids=ids, **{**how, **kwargs}).tolist()


def _one_by_one(model: Any, **kwargs: Any) -> list[list[int]]:
    """Each row in a call of its own, with its adapter active."""
    model, found = copy.deepcopy(model), []
    for i, name in enumerate(NAMES):
        model.set_adapter(name)
        model.eval()
        found += _generate(model, IDS[i : i + 1], **kwargs)
    return found


@pytest.mark.parametrize("settings", [SAMPLING, BEAMS], ids=["sampling", "beams"])
@pytest.mark.parametrize("kind", ["llama", "t5", "prompt", "mlp", "prefix"])
def test_each_row_keeps_its_adapter_in_all_its_sequences(kind: str, settings: Any) -> None:
    model = _model(kind)
    expected = _one_by_one(model, **settings)
    assert len(expected) == 2 * len(NAMES)
    assert _generate(model, IDS, adapter_names=NAMES, **settings) == expected
    config = tf.GenerationConfig(max_new_tokens=4, min_new_tokens=4, **settings)
    assert _generate(model, IDS, adapter_names=NAMES, generation_config=config) == expected
    inner = model.get_base_model()
    for name, value in settings.items():
        setattr(inner.generation_config, name, value)
    assert _generate(model, IDS, adapter_names=NAMES) == expected
    assert len(set(map(tuple, expected))) > 2  # the adapters say different things


def test_a_configuration_given_by_position_is_read() -> None:
    model = _model("llama")
    expected = _one_by_one(model, **SAMPLING)
    config = tf.GenerationConfig(max_new_tokens=4, min_new_tokens=4, **SAMPLING)
    found = model.generate(IDS, config, attention_mask=MASK, adapter_names=NAMES)
    assert found.tolist() == expected


def test_a_forward_is_not_repeated_by_what_generation_would_do() -> None:
    model = _model("llama")
    plain = model(input_ids=IDS, adapter_names=NAMES).logits
    model.get_base_model().generation_config.num_beams = 3
    assert torch.equal(model(input_ids=IDS, adapter_names=NAMES).logits, plain)


def test_an_invocation_holds_for_all_sequences_of_its_row() -> None:
    def config() -> peftkern.LoraConfig:
        return peftkern.LoraConfig(
            r=4,
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
            alora_invocation_tokens=[7, 9],
        )

    model = peftkern.get_peft_model(make("llama", "CAUSAL_LM", torch.float64), config())
    fill(model)
    model.eval()
    ids = IDS.clone()
    ids[0, 1:3] = ids[2, 3:5] = torch.tensor([7, 9])
    expected = [row for i in range(3) for row in _generate(model, ids[i : i + 1], **SAMPLING)]
    assert _generate(model, ids, **SAMPLING) == expected
    beams = tf.GenerationConfig(max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        _generate(model, ids, generation_config=beams)
