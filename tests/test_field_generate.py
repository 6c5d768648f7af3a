"""Generation of several sequences a row, and the token that a classifier reads behind a prompt."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from peftkern.tuners.prompting.pooling import last_tokens
from tests.closeness import assert_same_number, differ
from tests.prompts import config_of, prompt_model
from tests.tiny import fill, make

# HF PEFT asks for it in every model
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

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
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters() if family == "t5" else ():
            parameter.normal_(std=0.4, generator=g)  # as made it says the same whatever it is asked
    model = peftkern.get_peft_model(base, config())
    model.add_adapter("b", config())
    fill(model)
    return model.eval()


def _prompts_model(kind: str) -> Any:
    base = make("llama", "CAUSAL_LM", torch.float64)
    model = prompt_model(peftkern, kind, "llama", base=base)
    model.add_adapter("b", config_of(peftkern, kind))
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.prompt_encoder.named_parameters():
            parameter.normal_(std=2.0 if name.startswith("b") else 1.0, generator=g)
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


# -------------------------------------------------------------------- what a classifier reads

P = 5


def _classifier(kind: str, family: str, pad: int | None = 0) -> Any:
    base = make(family, "SEQ_CLS", torch.float64)
    base.config.pad_token_id = pad
    if hasattr(base, "pad_token_id"):
        base.pad_token_id = pad
    model = prompt_model(peftkern, kind, family, "SEQ_CLS", base=base, P=P)
    model.add_adapter("b", config_of(peftkern, kind, "SEQ_CLS", P=P))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model.eval()


LENGTHS = [6, 3, 5]


def _padded(side: str) -> tuple[Tensor, Tensor]:
    """[3, 6], of which the second and third row are padded with 0 on the one side or the other."""
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for i, n in enumerate(LENGTHS):
        at = slice(0, n) if side == "right" else slice(6 - n, 6)
        ids[i, at], mask[i, at] = IDS[i, :n], 1
    return ids, mask


def _each(model: Any, names: Any = None, embeds: bool = False) -> Tensor:
    """The logits of each row in a call of its own, without padding."""
    rows = []
    for i, n in enumerate(LENGTHS):
        given: dict[str, Any] = {"input_ids": IDS[i : i + 1, :n]}
        if embeds:
            given = {"inputs_embeds": model.word_embeddings(given["input_ids"])}
        more = {} if names is None else {"adapter_names": [names[i]]}
        rows.append(model(**given, attention_mask=torch.ones(1, n).long(), **more).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_the_last_real_token_is_read(kind: str, family: str) -> None:
    model = _classifier(kind, family)
    ids, mask = _padded("right")
    expected = _each(model)
    assert_same_number(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert_same_number(model(input_ids=ids).logits, expected)  # causal: padding behind is not seen
    shown = torch.ones_like(mask)  # the model's own rule is the pad token, whatever a mask shows
    assert_same_number(model(input_ids=ids, attention_mask=shown).logits, expected)
    names = ["b", "default", "b"]
    found = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    assert_same_number(found, _each(model, names))
    assert differ(found, expected)


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_are_read_by_their_mask(kind: str, family: str) -> None:
    model = _classifier(kind, family)
    ids, mask = _padded("right")
    embeds = model.word_embeddings(ids)
    found = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert_same_number(found, _each(model, embeds=True))
    alone = model(inputs_embeds=embeds[:1]).logits  # nothing says what is padding
    assert_same_number(alone, _each(model)[:1])


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
def test_padding_on_the_left_is_as_before(kind: str) -> None:
    """The last place is the last token: what a prompt in front of padding does is HF PEFT's."""
    ids, mask = _padded("left")

    models = []
    for library in (peftkern, peft):
        base = make("llama", "SEQ_CLS", torch.float64)
        models.append(prompt_model(library, kind, "llama", "SEQ_CLS", base=base).eval())
    ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in models)
    assert_same_number(ours, theirs)


def test_a_model_without_a_pad_token_is_read_by_the_mask() -> None:
    model = _classifier("prompt", "llama", pad=None)
    ids, mask = _padded("right")
    found = model(input_ids=ids[1:2], attention_mask=mask[1:2]).logits
    assert_same_number(found, _each(model)[1:2])
    with pytest.raises(ValueError, match="no padding token is defined"):  # the base model's word
        model(input_ids=ids, attention_mask=mask)


def test_a_model_of_images_has_the_pad_token_of_its_text() -> None:
    config = tf.Gemma3Config(text_config=tf.Gemma3TextConfig(pad_token_id=7))
    config.pad_token_id = None
    ids = torch.tensor([[5, 6, 7, 7], [5, 7, 6, 7], [5, 6, 8, 9]])
    found = last_tokens(SimpleNamespace(config=config), {"input_ids": ids})
    assert found is not None and found.tolist() == [1, 2, 3]


def test_the_loss_and_its_gradients_are_those_of_the_last_real_token() -> None:
    model = _classifier("prompt", "llama")
    ids, mask = _padded("right")
    labels = torch.tensor([2, 0, 1])
    gradients = []
    for call in (
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss,
        lambda: torch.nn.functional.cross_entropy(_each(model), labels),
    ):
        model.zero_grad()
        call().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("score" in name for name in gradients[0])
    assert_same_number(*gradients)


def test_an_encoder_and_a_classifier_of_tokens_are_left_alone() -> None:

    for family, task in (("bert", "SEQ_CLS"), ("llama", "TOKEN_CLS")):
        ids, mask = _padded("right")
        found = []
        for library in (peftkern, peft):
            base = make(family, task, torch.float64)
            model = prompt_model(library, "prompt", family, task, base=base).eval()
            found.append(model(input_ids=ids, attention_mask=mask).logits)
        assert_same_number(*found)
