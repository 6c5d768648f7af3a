"""Several prompts in one model: switching, a prompt for each row, heads, LoRA below, training."""

from __future__ import annotations

import contextlib
import copy
import pickle

import peft
import pytest
import torch
import transformers as tf

import peftkern
from tests.closeness import assert_same_number
from tests.plain_reference import peft_is_right
from tests.prompts import (
    PREFIXES,
    config_of,
    plain,
    prompt_model,
    prompt_pair,
    virtual_tokens,
)
from tests.tiny import assert_same, first, inputs, make, snapshot


def several(kind, family="llama", task="CAUSAL_LM", names=("default", "b"), **more):
    """peftkern's model with several prompts, each with values of its own."""
    model = prompt_model(peftkern, kind, family, task, adapter_name=names[0], **more)
    for seed, name in enumerate(names[1:], 11):
        torch.manual_seed(seed)
        model.add_adapter(name, config_of(peftkern, kind, task, **more))
    model.prompt_encoder.double()
    if task in ("SEQ_CLS", "TOKEN_CLS"):  # heads that differ, and from the base's
        for seed, name in enumerate(names):
            for key, value in model.named_parameters():
                if f"modules_to_save.{name}." in key:
                    torch.manual_seed(seed)
                    torch.nn.init.normal_(value)
    return model.eval()


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix", "projection"])
def test_adding_switching_deleting(kind):
    ours, theirs = prompt_pair(kind, "bert", "SEQ_CLS")
    batch = inputs("bert", "SEQ_CLS")
    for library, model in ((peftkern, ours), (peft, theirs)):
        torch.manual_seed(5)
        model.add_adapter("b", config_of(library, kind, "SEQ_CLS"))
        model.prompt_encoder.double()
        model.eval()
    base = make("bert", "SEQ_CLS", torch.float64)
    results = []
    for name in ("default", "b", "default"):
        for model in (ours, theirs):
            model.set_adapter(name)
            assert model.active_adapters == [name] and model.active_adapter == name
            assert model.active_peft_config is model.peft_config[name]
        results.append(first(ours(**batch)))
        expected = plain(kind, ours, virtual_tokens(ours, name))(base)(**batch)
        assert_same_number(results[-1], first(expected))
        if kind not in PREFIXES or peft_is_right("prefix of a head"):
            assert_same_number(results[-1], first(theirs(**batch)))
        here = trainable(ours)
        assert all(f".{name}." in key for key in here)
        assert {k.split(".")[0] for k in here} == {"prompt_encoder", "base_model"}
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    ours.set_adapter("b", inference_mode=True)
    assert not trainable(ours)
    for model in (ours, theirs):
        model.set_adapter("default")
        model.delete_adapter("b")
        assert set(model.peft_config) == {"default"} and model.active_adapters == ["default"]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert torch.equal(first(ours(**batch)), results[0])
    for name in ("nobody", 3):
        with pytest.raises(ValueError, match="not found"):
            ours.set_adapter(name)
    with pytest.raises(ValueError, match="does not exist"):
        ours.delete_adapter("nobody")
    with pytest.raises(ValueError, match="already exists"):
        ours.add_adapter("default", config_of(peftkern, kind, "SEQ_CLS"))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="num_layers"):
        ours.add_adapter("c", config_of(peftkern, kind, "SEQ_CLS", num_layers=0))
    assert_same(ours, before)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_deleting_the_active_one_and_the_last(kind):
    model = several(kind, "gpt2", "SEQ_CLS")
    batch = inputs("gpt2", "SEQ_CLS")
    model.set_adapter("b")
    wanted = first(model(**batch))
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active.*b"):
        model.delete_adapter("default")
    assert model.active_adapter == "b" and torch.equal(first(model(**batch)), wanted)
    assert all(".b." in name for name in trainable(model)) and trainable(model)
    model.delete_adapter("b")
    assert model.active_adapters == [] and not model.peft_config
    base = make("gpt2", "SEQ_CLS", torch.float64)
    assert torch.equal(first(model(**batch)), first(base(**batch)))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_disabling_gives_the_base_model(kind):
    """Its head too, which HF PEFT leaves as trained."""
    model = several(kind, "bert", "SEQ_CLS")
    batch = inputs("bert", "SEQ_CLS")
    base = first(make("bert", "SEQ_CLS", torch.float64)(**batch))
    before = first(model(**batch))
    flags = trainable(model)
    with model.disable_adapter():
        assert torch.equal(first(model(**batch)), base)
        with model.disable_adapter():
            pass
        assert torch.equal(first(model(**batch)), base)
        assert torch.equal(first(model(**batch, adapter_names=["b"] * 3)), base)
    assert torch.equal(first(model(**batch)), before) and trainable(model) == flags
    assert not torch.equal(before, base)


ROWS = {
    "one": ["b", "b", "b"],
    "mixed": ["b", "b", "default"],
    "base": ["__base__"] * 3,
    "mixed_base": ["b", "__base__", "default"],
    "one_or_base": ["__base__", "b", "__base__"],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix", "projection"])
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_a_prompt_for_each_row(kind, family, task, rows):
    names = ROWS[rows]
    model = several(kind, family, task)
    batch = inputs(family, task)
    if kind in ("prompt", "mlp") and len({n == "__base__" for n in names}) > 1:
        with pytest.raises(ValueError, match="'__base__' cannot share a batch"):
            model(**batch, adapter_names=names)
        return
    mine = first(model(**batch, adapter_names=names))
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        if name == "__base__":
            alone = first(make(family, task, torch.float64)(**row))
        else:
            model.set_adapter(name)
            alone = first(model(**row))
        assert_same_number(mine[i : i + 1], alone)


def test_what_the_injection_is_given_for_rows():
    model = several("prefix", names=("default", "b", "c"))
    model.prompt_encoder.requires_grad_(True)
    shared, none = model.tuner.prefix_layers(model, 4)
    assert none is None and all(k.dim() == 3 for k, _ in shared)
    one, none = model.tuner.prefix_layers(model, 4, ["b", "__base__", "b", "b"])
    assert all(k.dim() == 3 for k, _ in one) and none.tolist() == [False, True, False, False]
    parts = {n: model.tuner.prefix_layers(model, 1, [n])[0] for n in ("default", "b", "c")}
    many, none = model.tuner.prefix_layers(model, 4, ["c", "__base__", "default", "c"])
    assert none.tolist() == [False, True, False, False]
    for layer, (key, value) in enumerate(many):
        assert key.shape == value.shape == (4, 1, 5, 8)
        for row, name in ((0, "c"), (2, "default"), (3, "c")):
            assert torch.equal(key[row], parts[name][layer][0])
            assert torch.equal(value[row], parts[name][layer][1])
    assert model.tuner.prefix_layers(model, 2, ["__base__"] * 2) == ([], None)
    loss = sum((k * k).sum() + v.sum() for k, v in many)
    loss.backward()
    grads = {n: e.embedding.weight.grad for n, e in model.prompt_encoder.items()}
    assert grads["b"] is None and grads["c"].abs().sum() > 0 and grads["default"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_of_different_lengths(kind):
    """One after the other; not in one batch."""
    model = several(kind)
    model.add_adapter("long", config_of(peftkern, kind, P=9))
    batch = inputs("llama")
    lengths = []
    for name in ("default", "long", "default"):
        model.set_adapter(name)
        lengths.append(first(model(**batch)).shape[1])
        if kind == "prefix":
            assert model.peft_config[name].num_virtual_tokens in model.tuner.injection.lengths
    assert lengths == ([12, 16, 12] if kind == "prompt" else [7, 7, 7])
    with pytest.raises(ValueError, match="one length.*default: 5, long: 9"):
        model(**batch, adapter_names=["default", "long", "default"])
    model(**batch, adapter_names=["long"] * 3)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generating_with_a_prompt_for_each_row(family, kind, beams):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    model = several(kind, family, task)
    ids = inputs(family, task)["input_ids"].clamp(min=3)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams}
    names = ["b", "b", "default"]
    together = model.generate(input_ids=ids, adapter_names=names, **how)
    for i, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(together[i : i + 1], model.generate(input_ids=ids[i : i + 1], **how))
    alone = model.generate(input_ids=ids, adapter_names=["__base__"] * 3, **how)
    base = make(family, task, torch.float64)
    assert torch.equal(alone, base.generate(input_ids=ids, **how))


def test_heads_of_each_row_in_a_beam_search():
    """generate() repeats the rows for the beams; each keeps its own adapter's head."""
    model = several("prompt", names=("default", "b"), modules_to_save=["lm_head"])
    for seed, head in enumerate(model.base_model.lm_head.modules_to_save.values()):
        torch.manual_seed(seed)
        torch.nn.init.normal_(head.weight)
    ids = inputs("llama")["input_ids"].clamp(min=3)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    together = model.generate(ids, adapter_names=["b", "b", "default"], **how)
    for i, name in enumerate(["b", "b", "default"]):
        model.set_adapter(name)
        assert torch.equal(together[i : i + 1], model.generate(ids[i : i + 1], **how))


def test_embeddings_that_train_in_full():
    """With modules_to_save the prompt stands before the trained embeddings; HF PEFT uses both."""
    model = prompt_model(peftkern, "prompt", modules_to_save=["embed_tokens"]).eval()
    batch = inputs("llama")
    before = first(model(**batch))
    with torch.no_grad():
        model.base_model.model.embed_tokens.modules_to_save["default"].weight.zero_()
    assert not torch.equal(first(model(**batch)), before)
    assert model.word_embeddings.weight.abs().sum() == 0
    with model.disable_adapter():
        base = make("llama", dtype=torch.float64)
        assert torch.equal(first(model(**batch)), first(base(**batch)))


# --------------------------------------------------------------------------------- LoRA below


def lora_on(family="llama", task="CAUSAL_LM"):
    base = make(family, task, torch.float64)
    torch.manual_seed(1)
    lora = peftkern.LoraConfig(task_type=task, r=2, init_lora_weights=False)
    return peftkern.get_peft_model(base, lora).double()


def lora_and(kind, family="llama", task="CAUSAL_LM"):
    below = lora_on(family, task)
    torch.manual_seed(2)
    return below, peftkern.get_peft_model(below, config_of(peftkern, kind, task), "p").double()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_lora_and_a_prompt_together(kind, family, tmp_path):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    below, both = lora_and(kind, family, task)
    batch = inputs(family, task)
    both.eval()(**batch).loss.backward()
    grads = [n for n, p in both.named_parameters() if p.grad is not None]
    assert any("lora_A" in n for n in grads) and any("prompt_encoder.p" in n for n in grads)
    assert set(grads) == trainable(both)
    # the same prompt on a model whose weights hold the update
    merged = lora_on(family, task).base_model.model
    for name, layer in list(merged.named_modules()):
        if hasattr(layer, "lora_A"):
            with torch.no_grad():
                weight = layer.base_layer.weight
                weight += layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 4
            parent = merged.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.base_layer)
    alone = prompt_model(peftkern, kind, base=merged, task=task, seed=2).eval()
    assert_same_number(both(**batch).logits, alone(**batch).logits)
    ids = batch["input_ids"].clamp(min=3)
    how = {"input_ids": ids, "max_new_tokens": 4, "min_new_tokens": 4}
    assert torch.equal(both.generate(**how), alone.generate(**how))
    base = make(family, task, torch.float64)
    with both.disable_adapter():
        assert_same_number(both(**batch).logits, base(**batch).logits)
    both.save_pretrained(tmp_path)  # each where HF PEFT would put it
    again = peftkern.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = peftkern.PeftModel.from_pretrained(again, tmp_path / "p", "p").double()
    assert_same_number(again(**batch).logits, both(**batch).logits)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    assert_same_number(theirs(**batch).logits, below(**batch).logits)
    peft.PeftModel.from_pretrained(base, tmp_path / "p")


def test_lora_and_a_prompt_that_would_share_something():
    below = peftkern.get_peft_model(
        make("bert", "SEQ_CLS"), peftkern.LoraConfig(task_type="SEQ_CLS")
    )
    before = snapshot(below)
    with pytest.raises(ValueError, match="adapter_name.*'default'.*another"):
        peftkern.get_peft_model(below, config_of(peftkern, "prompt", "SEQ_CLS"))
    with pytest.raises(ValueError, match="classifier.*heads"):
        peftkern.get_peft_model(below, config_of(peftkern, "prompt", "SEQ_CLS"), "p")
    assert_same(below, before)


# ----------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    batch = inputs("llama")
    grads = []
    for checkpointing in (False, True):
        base = make("llama", dtype=torch.float64).train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = prompt_model(peftkern, kind, base=base).train()
        model(**batch).loss.backward()
        grads.append({n: p.grad for n, p in model.prompt_encoder.named_parameters()})
    assert_same_number(grads[1], grads[0])


@pytest.mark.parametrize("kind", ["prompt", "lstm", "prefix"])
def test_train_and_eval_reach_the_encoder(kind):
    more = {"encoder_dropout": 0.5} if kind == "lstm" else {}
    model = prompt_model(peftkern, kind, **more)
    assert model.training and model.prompt_encoder["default"].training
    if kind == "lstm":
        assert not torch.equal(model.get_prompt(1), model.get_prompt(1))
    model.eval()
    assert not model.prompt_encoder["default"].training and not model.base_model.training
    if kind == "lstm":
        assert torch.equal(model.get_prompt(1), model.get_prompt(1))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_trainer_trains_saves_and_resumes(kind, tmp_path):
    batch = inputs("llama", batch=4)
    data = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    losses = []
    for name, model in zip(("ours", "theirs"), prompt_pair(kind), strict=True):
        if kind == "prefix" and name == "theirs":
            for module in model.modules():  # the cache is not part of what the losses compare
                module.training = False

        def train(model, resume=None, name=name, **more):
            arguments = tf.TrainingArguments(
                output_dir=tmp_path / name,
                max_steps=2,
                save_steps=2,
                logging_steps=1,
                per_device_train_batch_size=2,
                learning_rate=1e-1,
                lr_scheduler_type="constant",
                use_cpu=True,
                report_to=[],
                seed=3,
                disable_tqdm=True,
                **more,
            )
            trainer = tf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
            return [row["loss"] for row in trainer.state.log_history if "loss" in row]

        losses.append(train(model))
        saved = {p.name for p in (tmp_path / name / "checkpoint-2").iterdir()}
        assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
        if name == "ours":
            trained = model.get_prompt_embedding_to_save("default")
            assert not torch.equal(
                trained, prompt_model(peftkern, kind).get_prompt_embedding_to_save("default")
            )
            again = prompt_model(peftkern, kind)
            if kind == "mlp":
                with pytest.raises(ValueError, match="is_trainable=False"):
                    train(again, tmp_path / name / "checkpoint-2")
            else:
                train(again, tmp_path / name / "checkpoint-2")
                assert torch.equal(again.get_prompt_embedding_to_save("default"), trained)
            best = prompt_model(peftkern, kind)
            frozen = pytest.warns(UserWarning, match="'default' is frozen")
            with frozen if kind == "mlp" else contextlib.nullcontext():
                train(best, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
            best.eval()(**batch)
    assert len(losses[0]) == 2
    assert_same_number(losses[0], losses[1])


def test_prefixes_are_not_refused_under_gradient_checkpointing():
    """As HF PEFT's are. Whether the gradients are right is a test of the injection."""
    base = make("llama")
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        prompt_model(peft, "prefix", base=base)
    assert prompt_model(peftkern, "prefix", base=base).base_model.is_gradient_checkpointing


def test_inputs_that_require_gradients_below_checkpointing():
    base = make("llama")
    base.gradient_checkpointing_enable()
    model = prompt_model(peftkern, "prompt", base=base)
    assert model.word_embeddings(torch.tensor([[4]])).requires_grad


# ------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_isinstance(how):
    model = several("prompt", "gpt2", "SEQ_CLS")
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert isinstance(model, peftkern.PeftModel)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    batch = inputs("gpt2", "SEQ_CLS")
    assert type(twin) is type(model) and isinstance(twin, peft.PeftModel)
    assert torch.equal(first(twin(**batch)), first(model(**batch)))
    with torch.no_grad():
        twin.prompt_encoder["default"].embedding.weight.zero_()
    assert not torch.equal(first(twin(**batch)), first(model(**batch)))
    assert twin.peft_config == model.peft_config
    assert twin.peft_config["b"] is not model.peft_config["b"]
