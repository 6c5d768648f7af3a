"""Models whose attention cannot take a prefix get it through their cache, as in HF PEFT."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import peftkern
from peftkern.ops import notes
from tests import models
from tests.closeness import assert_same_number, differ
from tests.prefix_models import WIDTH
from tests.prefix_zoo import (
    P,
    batch_of,
    checkpoints,
    generated,
    gradient,
    make,
    oracle,
    pair,
    real,
    task_of,
    tuned,
    weight_of,
)
from tests.tiny import first, loss_of

CACHED = [
    "roformer",
    "roformer decoder",
    "ctrl",
    "jetmoe",
    "recurrent_gemma",
    "big_bird",
    "llama4",
    "mvp",
    "led",
    "bigbird_pegasus",
    "seamless_m4t",
    "seamless_m4t_v2",
]
# HF PEFT's generation of recurrent_gemma looks for the cache in an output that has none
GENERATING = [f for f in CACHED if task_of(f) != "TOKEN_CLS" and f != "recurrent_gemma"]


HEADS = [
    ("jetmoe", "SEQ_CLS"),
    ("ctrl", "SEQ_CLS"),
    ("roformer", "QUESTION_ANS"),
    ("roformer", "FEATURE_EXTRACTION"),
    ("recurrent_gemma", "FEATURE_EXTRACTION"),
]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("family", "task"), [*((f, None) for f in CACHED), *HEADS])
def test_is_hf_pefts(family: str, task: str | None, padding: str | None) -> None:
    ours, batch = tuned(peftkern, family, task), batch_of(family, padding, task)
    mine, grad = gradient(ours, batch)
    wanted, expected = gradient(ours, batch, oracle(ours, family, task))
    assert_same_number(real(batch, first(mine)), real(batch, first(wanted)))
    assert_same_number(loss_of(mine).double(), loss_of(wanted).double())  # transformers: in fp32
    assert_same_number(grad, expected)
    with torch.no_grad(), ours.disable_adapter():
        plain = first(ours(**batch))
        assert_same_number(plain, first(make(family, task)(**batch)))
    assert differ(real(batch, plain), real(batch, first(wanted)))
    row = peftkern.explain(ours)[0]
    assert row.backend == "keys and values in the cache" and row.reason and not row.fused


@pytest.mark.parametrize("family", GENERATING)
def test_generation(family: str) -> None:
    ours, batch = tuned(peftkern, family), batch_of(family, "left")
    del batch["labels"]
    for how in (
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2},
    ):
        how = {"max_new_tokens": 5, "do_sample": False, **how}
        torch.manual_seed(0)
        tokens = ours.generate(**batch, **how)
        assert torch.equal(tokens, generated(ours, family, batch, **how)), how
    with ours.disable_adapter():
        how = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(ours.generate(**batch, **how), make(family).generate(**batch, **how))


def test_a_recurrent_state_begins_anew() -> None:
    """RecurrentGemma keeps it in its layers, and HF PEFT goes on with that of the batch before."""
    ours, theirs = pair("recurrent_gemma")
    batch = batch_of("recurrent_gemma")
    expected = theirs(**batch).logits
    for _ in range(2):
        output, _ = gradient(ours, batch)
        assert_same_number(output.logits, expected)
    ids = batch["input_ids"]
    tokens = ours.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, ours(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids)
    assert torch.equal(tokens, ours.generate(batch["input_ids"], max_new_tokens=5, do_sample=False))


# -------------------------------------------------------------------- what users have


def test_several_adapters_and_rows_of_each() -> None:
    model, batch = tuned(peftkern, "ctrl"), batch_of("ctrl", "left")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.double()
    with torch.no_grad():
        weight_of(model, "other").normal_(generator=torch.Generator().manual_seed(2))
        mixed = model(**batch, adapter_names=["other", "default", "other"]).logits
        one = model(**batch).logits
        model.set_adapter("other")
        two = model(**batch).logits
        assert differ(one, two)
        for row, expected in enumerate((two, one, two)):
            assert_same_number(mixed[row], expected[row])
        del batch["labels"]
        how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
        tokens = model.generate(**batch, **how, adapter_names=["other", "default", "other"])
        alone = model.generate(**batch, **how)
        assert torch.equal(tokens[0], alone[0]) and torch.equal(tokens[2], alone[2])
        with pytest.raises(ValueError, match="'__base__' cannot share a batch with prefixes that"):
            model(**batch, adapter_names=["other", "__base__", "other"])
        with pytest.warns(UserWarning, match="other was active"):
            model.delete_adapter("other")
        assert_same_number(model(**batch).logits, one)
    assert_same_number(model.base_model(**batch).logits, make("ctrl")(**batch).logits)


def test_files_of_either_library(tmp_path: Any) -> None:
    ours, theirs = pair("jetmoe")
    batch = batch_of("jetmoe", "left")
    expected = theirs(**batch).logits
    for library, model in ((peft, ours), (peftkern, theirs)):
        folder = tmp_path / library.__name__
        model.float().save_pretrained(folder)
        loaded = library.PeftModel.from_pretrained(make("jetmoe").float(), folder).double().eval()
        weight = weight_of(ours.double() if library is peft else theirs.double())
        with torch.no_grad():
            weight_of(loaded).copy_(weight)  # the file has float32
        assert_same_number(loaded(**batch).logits, model(**batch).logits)
    assert_same_number(ours(**batch).logits, theirs(**batch).logits)
    assert differ(expected, make("jetmoe")(**batch).logits)


@pytest.mark.parametrize("family", ["ctrl", "mvp", "jetmoe"])
def test_without_a_cache_of_the_callers(family: str) -> None:
    """use_cache=False asks for none to be kept; the prefix is seen all the same."""
    model, batch = tuned(peftkern, family), batch_of(family, "left")
    output = model(**batch, use_cache=False)
    assert getattr(output, "past_key_values", None) is None
    assert_same_number(output.logits, model(**batch).logits)
    model.base_model.config.use_cache = False
    assert_same_number(model(**batch).logits, output.logits)
    assert not any(isinstance(x, tf.Cache) for x in model(**batch, return_dict=False))
    del batch["labels"]
    how = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**batch, **how, use_cache=True)
    assert torch.equal(tokens, model.generate(**batch, **how, use_cache=False))


def test_a_cache_of_the_callers() -> None:
    model, batch = tuned(peftkern, "ctrl"), batch_of("ctrl")
    ids = batch["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = tf.DynamicCache()
        parts = [
            model(input_ids=ids[:, :4], past_key_values=cache).logits,
            model(input_ids=ids[:, 4:], past_key_values=cache).logits,
        ]
        assert_same_number(torch.cat(parts, dim=1), whole)
        assert cache.get_seq_length() == P + ids.shape[1]
        with model.disable_adapter():
            foreign = model(input_ids=ids).past_key_values
        with pytest.raises(ValueError, match="DynamicCache of 9 tokens without the prefix of 5"):
            model(input_ids=ids, past_key_values=foreign)
        with pytest.raises(ValueError, match="a StaticCache of 0 tokens without the prefix of 5"):
            model.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static")
        assert_same_number(model(input_ids=ids).logits, whole)
        longer = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 2)
        model.add_adapter("longer", longer)
        model.set_adapter("longer")
        with pytest.raises(ValueError, match="14 tokens without the prefix of 7"):
            model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask.*batch, tokens"):
            model(input_ids=ids, attention_mask=torch.ones(3, 1, 9, 9))


def test_position_ids() -> None:
    """Counted from 0 by the caller, and from P on by the model."""
    model, theirs = pair("jetmoe")
    batch = batch_of("jetmoe")
    ids = torch.arange(9).flip(0)[None]
    mine = model(**batch, position_ids=ids).logits
    assert_same_number(mine, theirs(**batch, position_ids=ids).logits)
    assert differ(mine, model(**batch).logits)


def _hooks_and_flags(model: Any) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, [p.requires_grad for p in model.parameters()]


def test_checkpoints_are_refused() -> None:
    model = make("roformer decoder")
    checkpoints(model, "enable")
    config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    before = _hooks_and_flags(model)
    words = "PREFIX_TUNING does not work with gradient checkpointing for RoFormerForCausalLM"
    with pytest.raises(ValueError, match=words):
        peftkern.get_peft_model(model, config)
    assert _hooks_and_flags(model) == before

    model, batch = tuned(peftkern, "roformer decoder"), batch_of("roformer decoder")
    expected = model(**batch).logits
    checkpoints(model, "enable")
    assert_same_number(model(**batch).logits, expected)  # in evaluation there are none
    model.train()
    with pytest.raises(ValueError, match=words):
        model(**batch)


def test_it_is_said(caplog: Any) -> None:
    notes._said.clear()
    with caplog.at_level(logging.INFO, "peftkern"):
        models = [tuned(peftkern, "ctrl") for _ in range(2)]
    said = [r.getMessage() for r in caplog.records if "cache" in r.getMessage()]
    assert said == [
        "the prefix of CTRLLMHeadModel goes through its cache: no layers with a self-attention "
        "module of a known name were found"
    ]
    table = peftkern.explain(models[0])
    assert len(table) == 1 and table[0].name == "base_model" and table[0].shape == (P, WIDTH)
    assert table[0].kind == "CTRLLMHeadModel" and table[0].ranks == {"default": P}
    assert "no layers with a self-attention" in str(table)


def test_what_needs_injection_is_refused() -> None:
    config = peftkern.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_always_visible=True
    )
    model = make("ctrl")
    with pytest.raises(ValueError, match="prefix_always_visible is not possible for CTRLLMHead"):
        peftkern.get_peft_model(model, config)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_hf_peft_refuses_is_refused() -> None:
    config = peftkern.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    with pytest.raises(ValueError, match="does not support ViTModel.*Model does not support past"):
        peftkern.get_peft_model(tf.ViTModel(models.config("vit")), config)
    albert = tf.AlbertModel(models.config("albert"))
    with pytest.raises(ValueError, match="through its cache: its cache has no effect"):
        peftkern.get_peft_model(albert, config)


def test_copies_and_threads() -> None:
    model, batch = tuned(peftkern, "ctrl"), batch_of("ctrl", "left")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batch).logits
        plain = make("ctrl")(**batch).logits
        weight_of(twin).neg_()
        other = twin(**batch).logits
        assert differ(other, expected)
        assert_same_number(model(**batch).logits, expected)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                got = (model if i else model.base_model)(**batch).logits
            if differ(got, expected if i else plain):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    model, batch = tuned(peftkern, "roformer decoder"), batch_of("roformer decoder", "left")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_number(compiled(**batch).logits, model(**batch).logits)
    torch._dynamo.reset()
