"""A prefix has the same effect in a model's attention and in its cache.

The two ways share only the prefix's numbers. Where HF PEFT is wrong, the cache is the oracle.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from peftkern.tuners.prefix_tuning import families, way
from peftkern.utils.versions import cache_name
from tests.closeness import assert_same_number, differ
from tests.plain_reference import with_prefix
from tests.prefix_models import P, inputs, make, split, task_of
from tests.prefix_zoo import gradient, real, weight_of
from tests.tiny import first, loss_of

FAMILIES = ("llama gpt2 opt bert roberta t5 bart mistral gemma3 bloom").split()


def tuned(base: Any, task: str) -> Any:
    config = peftkern.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    model = peftkern.get_peft_model(base, config)
    with torch.no_grad():
        weight_of(model).normal_(generator=torch.Generator().manual_seed(1))
    return model.double().eval()


def through_cache(base: Any, task: str, monkeypatch: Any) -> Any:
    def find(model: Any, num_layers: int) -> Any:
        raise families.refuse(model, "this test wants it so")

    with monkeypatch.context() as patch:
        patch.setattr(way, "find", find)
        model = tuned(base, task)
    assert peftkern.explain(model)[0].reason == "this test wants it so"
    return model


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "opt", "bert", "roberta", "t5", "bart", "mistral", "gemma3", "bloom"],
)
def test_both_ways_agree(family: str, padding: str | None, monkeypatch: Any) -> None:
    task = task_of(family)
    base = make(family).double()
    if cache_name(base.base_model) is None:
        pytest.skip("from transformers 5.24, encoders have no cache")
    injected = tuned(copy.deepcopy(base), task)
    cached = through_cache(copy.deepcopy(base), task, monkeypatch)
    assert peftkern.explain(injected)[0].reason != peftkern.explain(cached)[0].reason
    batch = inputs(family, padding)
    mine, grad = gradient(cached, batch)
    wanted, expected = gradient(injected, batch)
    assert_same_number(real(batch, mine.logits), real(batch, wanted.logits))
    assert_same_number(loss_of(mine).double(), loss_of(wanted).double())
    assert_same_number(grad, expected)
    assert differ(real(batch, base(**batch).logits), real(batch, wanted.logits))
    if task == "SEQ_CLS" or padding == "right":
        return
    del batch["labels"]
    for how in ({"num_beams": 3}, {"do_sample": True}, {"use_cache": False}):
        tokens = []
        for model in (injected, cached):
            torch.manual_seed(0)
            tokens.append(model.generate(**batch, max_new_tokens=6, **{"do_sample": False, **how}))
        assert torch.equal(*tokens), how


# -------------------------------------------------------------------- HF PEFT is no oracle


def pairs_of(model: Any, layers: int) -> Any:
    config = model.peft_config["default"]
    heads = config.num_attention_heads
    return split(weight_of(model), heads, config.num_layers, False)[:layers]


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "mbart", "marian", "pegasus"])
def test_features_of_an_encoder_decoder(family: str, padding: str | None) -> None:
    """HF PEFT is no oracle here, and fails for a padded batch.

    It lets the decoder's attention to the encoder see the prefix and the decoder's own keys, and
    lengthens the encoder's mask.
    """
    base = make(family, "FEATURE_EXTRACTION").double()
    batch = inputs(family, padding, "SEQ_2_SEQ_LM")
    batch["decoder_input_ids"] = batch.pop("labels")
    model = tuned(copy.deepcopy(base), "FEATURE_EXTRACTION")
    expected = first(with_prefix(base, pairs_of(model, base.config.num_hidden_layers), **batch))
    assert_same_number(first(model(**batch)), expected)
    assert differ(first(base(**batch)), expected)


def test_questions_to_an_encoder_decoder(monkeypatch: Any) -> None:
    """HF PEFT runs T5's encoder alone, and the prefix gets no gradient."""
    base = make("t5", "QUESTION_ANS")
    injected = tuned(copy.deepcopy(base), "QUESTION_ANS")
    cached = through_cache(copy.deepcopy(base), "QUESTION_ANS", monkeypatch)
    batch: dict[str, Tensor] = inputs("t5")
    del batch["labels"]
    batch["start_positions"] = torch.tensor([0, 1, 2])
    batch["end_positions"] = torch.tensor([3, 3, 3])
    mine, grad = gradient(injected, batch)
    wanted, expected = gradient(cached, batch)
    assert_same_number(mine.start_logits, wanted.start_logits)
    assert_same_number(grad, expected)
    assert grad.abs().max() > 0
    assert differ(mine.start_logits, base(**batch).start_logits)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_all_of_the_base_model_is_frozen(kind: str) -> None:
    """In HF PEFT some parameters of the base model train, which none of its files holds.

    Examples are XLNet's ``mask_emb`` and LLaVA-NeXT's ``image_newline``.
    """

    class Marked(tf.LlamaModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mark = torch.nn.Parameter(torch.zeros(3))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    def trains(library: Any) -> list[str]:
        config = getattr(library, kind)(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
        model = library.get_peft_model(Marked(make("llama").config), config)
        return [name for name, p in model.named_parameters() if p.requires_grad]

    ours = trains(peftkern)
    assert ours == ["prompt_encoder.default.embedding.weight"]
    assert set(trains(peft)) - set(ours) == {"base_model.mark"}
