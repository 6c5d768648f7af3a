"""Prefix tuning, prompt tuning and p-tuning against HF PEFT: names, first values and results."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf

import peftkern
from tests import models
from tests.closeness import assert_same_number
from tests.plain_reference import greedy, peft_is_right, recomputed
from tests.prompts import KINDS, PREFIXES, plain, prompt_model, prompt_pair, virtual_tokens
from tests.tiny import CASES, first, inputs, loss_of, make, step


def cached(prompt):
    cache = getattr(prompt, "self_attention_cache", prompt)
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_same_prompt(ours, theirs):
    """HF PEFT makes one for each row of the batch, which may be another order of sums."""
    if torch.is_tensor(theirs):
        assert_same_number(ours, theirs)
    else:
        assert type(ours) is type(theirs) and cached(theirs)
        assert_same_number(cached(ours), cached(theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("gpt2", "SEQ_CLS"),
        ("bert", "TOKEN_CLS"),
        ("bert", "QUESTION_ANS"),
        ("t5", "SEQ_2_SEQ_LM"),
    ],
)
def test_made_as_peft_makes_it(kind, family, task):
    """Names, flags, counts, first values, prompts, and the configuration that gets saved."""
    ours, theirs = prompt_pair(kind, family, task)
    here = dict(ours.named_parameters())
    there = dict(theirs.named_parameters())
    assert list(here) == list(there)
    for name, value in there.items():
        assert torch.equal(here[name], value), name
        assert here[name].requires_grad == value.requires_grad, name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert_same_prompt(ours.get_prompt(3), theirs.get_prompt(3))
    saved = ours.get_prompt_embedding_to_save("default")
    assert_same_number(saved, theirs.get_prompt_embedding_to_save("default"))
    mine, other = (m.peft_config["default"].to_dict() for m in (ours, theirs))
    for values in (mine, other):  # HF PEFT names the heads twice
        values["modules_to_save"] = set(values["modules_to_save"] or ())
    assert mine == other
    assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
    assert ours.word_embeddings.weight is ours.base_model.get_input_embeddings().weight
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
    assert ours.transformer_backbone_name == theirs.transformer_backbone_name
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert ours.get_base_model() is ours.base_model
    for path in ("prompt_encoder", "base_model"):  # either library's weights load into the other
        getattr(ours, path).load_state_dict(getattr(theirs, path).state_dict())
        getattr(theirs, path).load_state_dict(getattr(ours, path).state_dict())


@pytest.mark.filterwarnings("ignore:Token type ids are not supported")
@pytest.mark.parametrize("kind", ["prompt", "lstm"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_numbers_of_prompts(kind, family, task):
    """Loss, logits and every gradient, padding included."""
    ours, theirs = prompt_pair(kind, family, task)
    batch = inputs(family, task)
    if task == "SEQ_CLS" and family not in ("bert", "t5"):
        # without the padded row, of which HF PEFT reads the padding: see test_field_generate.py
        batch = {name: value[::2] for name, value in batch.items()}
    tokens = virtual_tokens(ours)
    base = plain(kind, ours, tokens)(make(family, task, torch.float64))
    if family == "t5" and task in ("SEQ_CLS", "QUESTION_ANS"):
        for model in (ours, theirs):  # these models of transformers take no embeddings
            with pytest.raises((NotImplementedError, ValueError), match="input"):
                model(**batch)
        return
    told = dict(batch)
    if family == "bert":
        batch["token_type_ids"] = batch["input_ids"] % 2
        if task in ("SEQ_CLS", "TOKEN_CLS"):  # elsewhere they are dropped
            told = batch
    found, output = step(ours, batch), base(**told)
    loss_of(output).backward()
    assert_same_number(found["loss"], loss_of(output).detach())
    assert_same_number(found["output"], first(output))
    if kind == "prompt":
        grad = found["prompt_encoder.default.embedding.weight"]
        assert_same_number(grad[: len(tokens)], tokens.grad)
    if task == "TOKEN_CLS":  # HF PEFT fails on labels here: it leaves them shorter than logits
        with pytest.raises(ValueError, match="batch_size"):
            theirs(**batch)
        del batch["labels"]
        assert_same_number(first(ours(**batch)), first(theirs(**batch)))
        return
    assert any("prompt_encoder" in name for name in found)
    assert_same_number(found, step(theirs, batch))


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("gpt2", "SEQ_CLS"),
        ("llama", "TOKEN_CLS"),
        ("llama", "FEATURE_EXTRACTION"),
        ("t5", "SEQ_2_SEQ_LM"),
    ],
)
def test_numbers_of_prefixes(kind, family, task):
    """The injection gets the tensors that belong in a cache, and gives their gradients."""
    ours, theirs = prompt_pair(kind, family, task)
    batch = inputs(family, task)
    tokens = virtual_tokens(ours)
    found = step(ours, batch)
    output = plain(kind, ours, tokens)(make(family, task, torch.float64))(**batch)
    assert_same_number(found["output"], first(output))
    loss_of(output).backward()
    if kind == "prefix":
        assert_same_number(found["prompt_encoder.default.embedding.weight"], tokens.grad)
    assert any("prompt_encoder" in name for name in found)
    if peft_is_right("prefix of a head" if task.endswith("CLS") else "prefix"):
        assert_same_number(found, step(theirs, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["prompt", "lstm"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bits_of_prompts_in_other_dtypes(family, kind, dtype):
    """The same operations as HF PEFT's, so the same bits."""
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    found, expected = (
        step(model, inputs(family, task)) for model in prompt_pair(kind, family, task, dtype=dtype)
    )
    assert found.keys() == expected.keys() and found["output"].dtype == dtype
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_trained_prefix_is_handed_over_as_it_is():
    """No copy over the batch, and none of the parameter: each layer gets views of it."""
    ours = prompt_model(peftkern, "prefix")
    prefixes, no_prefix = ours.tuner.prefix_layers(ours, 7)
    weight = ours.prompt_encoder["default"].embedding.weight
    assert no_prefix is None and len(prefixes) == 2
    for pair in prefixes:
        for part in pair:
            assert part.shape == (1, 5, 8)
            assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    (prefixes[0][0].sum() + 2 * prefixes[1][1].sum()).backward()
    # layer 0's keys are the first slice of a row, layer 1's values the last
    assert torch.equal(weight.grad, torch.tensor([1.0] * 8 + [0.0] * 16 + [2.0] * 8).expand(5, 32))
    prompt = prompt_model(peftkern, "prompt")
    assert prompt.tuner.prompts(prompt, 7).stride(0) == 0


MODELS = {
    "bart": ("bart", {"layers": 3}),
    "bart_3_2": ("bart", {"layers": 3, "decoder_layers": 2}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"sliding_window": 3}),
    "bloom": ("bloom", {}),
    "falcon_new": ("falcon", {"heads": 4, "kv": 2}),
    "gpt_bigcode": ("gpt_bigcode", {}),
}


def other_model(name):
    family, settings = MODELS[name]
    return models.build(family, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_more_families(name):
    task = models.task_of(MODELS[name][0])
    ours, theirs = prompt_pair("prefix", base=other_model(name), task=task)
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    mine, other = cached(ours.get_prompt(2)), cached(theirs.get_prompt(2))
    layers = MODELS[name][1].get("decoder_layers", len(other))
    assert len(mine) == layers
    for o, t in zip(mine, other[:layers], strict=True):
        assert torch.equal(o[0], t[0]) and torch.equal(o[1], t[1])


@pytest.mark.parametrize("submodules", [1, 2])
def test_layout_of_seq2seq_prefixes(submodules):
    """With two submodules decoder layer l reads the slices 4l and 4l + 1 modulo 2L."""
    more = {"task": "SEQ_2_SEQ_LM", "num_transformer_submodules": submodules}
    ours = prompt_model(peftkern, "prefix", base=other_model("bart"), **more)
    weight = ours.prompt_encoder["default"].embedding.weight.detach()
    slices = weight.view(5, 6, 2, 8).permute(1, 2, 0, 3)
    step = 2 * submodules
    for layer, (key, value) in enumerate(ours.tuner.prefix_layers(ours, 1)[0]):
        assert torch.equal(key, slices[step * layer % 6])
        assert torch.equal(value, slices[(step * layer + 1) % 6])


SIZES_PEFT_CANNOT_TELL = {
    # Falcon's multi-query attention caches one head; T5's heads need not make up its width
    "falcon": ("falcon_mqa", {}, (2, 1, 8, 5)),
    "mpt": ("mpt", {}, (2, 2, 8, 5)),
    "t5": ("t5", {"d_kv": 4, "num_decoder_layers": 3}, (3, 2, 4, 5)),
}


@pytest.mark.parametrize("name", SIZES_PEFT_CANNOT_TELL)
def test_sizes_that_peft_cannot_tell(name):
    family, settings, sizes = SIZES_PEFT_CANNOT_TELL[name]
    base, task = models.build(family, **settings), models.task_of(family)
    ours = prompt_model(peftkern, "prefix", base=base, task=task)
    injection = ours.tuner.injection
    found = (injection.kv_heads, injection.head_dim, injection.num_virtual_tokens)
    assert (len(injection.attentions), *found) == sizes


def test_layers_of_different_sizes():
    """Gemma 4: layers take a part of the prefix, and one with another's keys takes that one's."""
    both = ["sliding_attention", "full_attention"]
    base = models.build("gemma4", num_hidden_layers=4, layer_types=2 * both, num_kv_shared_layers=1)
    ours, theirs = prompt_pair("prefix", base=base)
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    with pytest.warns(UserWarning, match=r"skipped \[3\] due to KV shape"):
        prefixes, _ = ours.tuner.prefix_layers(ours, 1)
        mine = cached(ours.get_prompt(2))
    assert [None if p is None else p[0].shape[-1] for p in prefixes] == [8, 16, 8, 16]
    assert prefixes[3][0] is prefixes[1][0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Prefix tuning injected into layers")
        other = cached(theirs.get_prompt(2))
    for pair, wanted in zip(mine, other, strict=True):
        for found, value in zip(pair, wanted, strict=True):
            assert (found is None) == (value is None) and (found is None or found.equal(value))
    ours.base_model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="skipped every layer"):
        ours.get_prompt(2)


def test_embeddings_narrower_than_the_model():
    base = models.build("electra", embedding_size=8)
    ours = prompt_model(peftkern, "mlp", base=base, task="SEQ_CLS")
    assert ours.peft_config["default"].token_dim == 8
    batch = inputs("bert", "SEQ_CLS")
    ours(**batch).loss.backward()
    assert ours.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


GENERATE = {
    "padded": {"padded": True},
    "no_mask": {"attention_mask": None},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "padded": True},
    "no_cache": {"use_cache": False, "padded": True},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation(family, kind, how):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    ids = inputs(family, task)["input_ids"].clamp(min=3)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GENERATE[how]}
    if call.pop("padded", False):
        call["input_ids"][0, :3] = call["attention_mask"][0, :3] = 0
    if call["attention_mask"] is None:
        del call["attention_mask"]
    ours, theirs = (model.eval() for model in prompt_pair(kind, family, task))
    base = make(family, task, torch.float64)
    run = plain(kind, ours, virtual_tokens(ours).detach())
    generators = [ours.generate]
    if family == "t5" or peft_is_right("prompt generate"):
        generators.append(theirs.generate)
    if family != "t5":  # whose encoder generate() runs by itself
        generators.append(recomputed(base, run).generate)
    results = []
    for generate in generators:
        torch.manual_seed(1)
        settings = {"output_scores": True, "return_dict_in_generate": True}
        # HF PEFT says that it drops the position_ids of generate() itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")
            out = generate(**call, max_new_tokens=6, **settings)
        results.append((out.sequences, torch.stack(out.scores).double()))
    if how == "padded":
        results.append(greedy(base, run(base), call, 6))
    for tokens, scores in results[1:]:
        assert torch.equal(results[0][0], tokens)
        assert_same_number(results[0][1], scores)


def test_generation_leaves_the_model_as_it_was():
    ours = prompt_model(peftkern, "prompt").eval()
    ids = inputs("llama")["input_ids"]
    ours.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="nonsense"):
        ours.generate(ids, max_new_tokens=2, nonsense=object())
    assert "prepare_inputs_for_generation" not in vars(ours.base_model)
    alone = make("llama", dtype=torch.float64).generate(ids, max_new_tokens=4)
    assert torch.equal(ours.base_model.generate(ids, max_new_tokens=4), alone)
    with ours.disable_adapter():
        assert torch.equal(ours.generate(ids, max_new_tokens=4), alone)
    assert not torch.equal(ours.generate(ids, max_new_tokens=4), alone)


def test_generation_in_ways_that_peft_has_not():
    """From embeddings, going on from a cache, in two pieces, in a static cache."""
    ours = prompt_model(peftkern, "prompt").eval()
    ids = inputs("llama")["input_ids"].clamp(min=3)
    whole = ours.generate(ids, max_new_tokens=9, min_new_tokens=9)
    embeds = ours.word_embeddings(ids)
    new = ours.generate(inputs_embeds=embeds, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(new, whole[:, 7:])
    part = ours.generate(ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    rest = {"max_new_tokens": 5, "min_new_tokens": 5}
    more = ours.generate(part.sequences, past_key_values=part.past_key_values, **rest)
    assert torch.equal(more, whole)
    static = tf.StaticCache(ours.config, max_cache_len=5 + 16)
    more = ours.generate(ids, past_key_values=static, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(more, whole)
    with pytest.raises(ValueError, match="cache_implementation='static'.*=StaticCache"):
        ours.generate(ids, cache_implementation="static", max_new_tokens=4)
    logits = ours(ids).logits[:, -3:]
    some = ours(ids[:, :4], use_cache=True)
    rest = ours(ids[:, 4:], past_key_values=some.past_key_values)
    assert_same_number(rest.logits, logits)


def test_steps_of_generation_by_hand():
    for task, family in (("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5")):
        ours, theirs = prompt_pair("prompt", family, task)
        ids = inputs(family, task)["input_ids"]
        call = {"attention_mask": torch.ones_like(ids)}
        if task == "CAUSAL_LM":
            mine = ours.prepare_inputs_for_generation(ids, **call)
            other = theirs.prepare_inputs_for_generation(ids, **call)
            for name in ("inputs_embeds", "attention_mask"):
                assert torch.equal(mine[name], other[name].to(mine[name].dtype)), name
            assert mine["input_ids"] is other["input_ids"] is None
        else:
            mine = ours.prepare_inputs_for_generation(ids, encoder_outputs=1, **call)
            assert torch.equal(mine["decoder_input_ids"], ids)


@pytest.mark.long
def test_compile():
    ours = prompt_model(peftkern, "prompt").eval()
    batch = inputs("llama")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same_number(compiled(**batch).logits, ours(**batch).logits)
    torch._dynamo.reset()


def test_text(tmp_path):
    """The tokens of a text, repeated or cut, as HF PEFT has them; no code of the tokenizer's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("a b c d e".split())}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    for text in ("b c", "b c d e d c b"):
        how = {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": text,
            "tokenizer_name_or_path": str(tmp_path),
        }
        ours, theirs = prompt_pair("prompt", **how, tokenizer_kwargs={"trust_remote_code": True})
        found = ours.get_prompt_embedding_to_save("default")
        assert torch.equal(found, theirs.get_prompt_embedding_to_save("default"))
        rows = [{"b": 1, "c": 2, "d": 3, "e": 4}[w] for w in (text.split() * 3)[:5]]
        assert torch.equal(found, ours.word_embeddings.weight[rows])
    with pytest.raises(ValueError, match="prompt_tuning_init_text.*no tokens"):
        prompt_model(peftkern, "prompt", **{**how, "prompt_tuning_init_text": " "})
