"""transformers' Trainer and accelerate on a peftkern model and on a fused one.

Training, saving, resuming and loading the best model give HF PEFT's numbers and files.
"""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, pipeline

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.models import VOCAB
from tests.needs import needs
from tests.tiny import first, inputs, make
from tests.trainers import (
    ARGUMENTS,
    CHECKPOINTING,
    adapter,
    assert_equal,
    losses,
    ours,
    sentences,
    theirs,
    tokenizer,
)

DOORS = {
    "peftkern": (ours, []),
    "fused": (theirs, [peftkern.FuseCallback()]),
    "HF PEFT": (theirs, []),
}


def rows(seed=0, count=8):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, 6), generator=g)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def trainer_of(door, out, steps=4, dtype=torch.float64, **arguments):
    make_model, callbacks = DOORS[door]
    return Trainer(
        model=make_model(dtype),
        args=TrainingArguments(output_dir=out, max_steps=steps, **{**ARGUMENTS, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows(1),
        callbacks=callbacks,
    )


REENTRANT = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}


def run(door, out, **arguments):
    """(losses, the adapter afterwards) of a training, in which peftkern's layers must run."""
    trainer = trainer_of(door, out, save_strategy="no", **arguments)
    found = losses(trainer), adapter(trainer.model)
    assert sum(r.fused for r in peftkern.explain(trainer.model)) == (14 * (door != "HF PEFT"))
    return found


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("peftkern", {}),
        ("fused", {}),
        ("fused", {CHECKPOINTING: True}),
        ("peftkern", {CHECKPOINTING: True, **REENTRANT}),
    ],
    ids=["plain-peftkern", "plain-fused", "checkpointing", "reentrant"],
)
def test_losses_are_hf_pefts(door, arguments, tmp_path):
    ours, theirs = (run(name, tmp_path, **arguments) for name in (door, "HF PEFT"))
    assert_same_number(ours, theirs)
    assert len(ours[0]) == 4 and abs(ours[0][0] - ours[0][-1]) > 1e-2  # something is learnt


@pytest.mark.parametrize(
    ("door", "dtype", "arguments"),
    [
        ("peftkern", torch.float32, {}),
        ("fused", torch.float32, {"bf16": True}),
        ("peftkern", torch.bfloat16, {"gradient_accumulation_steps": 2}),
    ],
    ids=["float32", "autocast", "bfloat16"],
)
def test_in_other_dtypes_the_adapter_is_as_good_as_hf_pefts(door, dtype, arguments, tmp_path):
    """With SGD: Adam's steps have the size of the learning rate even where a gradient is noise."""
    settings = {"optim": "sgd", "learning_rate": 0.5, **arguments}
    found = [run(name, tmp_path, dtype=dtype, **settings)[1] for name in (door, "HF PEFT")]
    settings.pop("bf16", None)
    exact, start = run("HF PEFT", tmp_path, **settings)[1], adapter(theirs())
    assert all(differ(exact[name], start[name]) for name in exact)
    assert_as_good_as_torch(*found, exact)


@pytest.mark.parametrize("door", ["peftkern", "fused"])
def test_checkpoint_resume_best_model_and_save(door, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
    whole = trainer_of(door, tmp_path / "whole", steps=6, **settings)
    start = adapter(whole.model)
    uninterrupted = losses(whole)
    for step in (2, 4, 6):
        names = {p.name for p in (tmp_path / "whole" / f"checkpoint-{step}").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
        assert not {"model.safetensors", "pytorch_model.bin"} & names

    # the highest evaluation loss counts as best, so that the last checkpoint is not the best one
    evaluated = {r["step"]: r["eval_loss"] for r in whole.state.log_history if "eval_loss" in r}
    best = max(evaluated, key=evaluated.get)
    assert whole.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and best != 6
    saved = load_file(tmp_path / "whole" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert_equal(peft.get_peft_model_state_dict(whole.model), saved)
    assert_same_number(whole.evaluate()["eval_loss"], evaluated[best])

    again = trainer_of(door, tmp_path / "whole", steps=6, **settings)
    assert_equal(adapter(again.model), start)
    resumed = losses(again, tmp_path / "whole" / "checkpoint-2")
    assert_same_number(resumed, uninterrupted)
    assert len(resumed) == 6
    if door == "fused":
        assert sum(row.fused for row in peftkern.explain(again.model)) == 14

    whole.save_model(str(tmp_path / "saved"))
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors",
                     "training_args.bin"}  # fmt: skip
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"]
    batch = inputs("llama")
    whole.model.eval()
    expected = first(whole.model(**batch))
    for library in (peft, peftkern):
        base = make("llama", dtype=torch.float64)
        loaded = library.PeftModel.from_pretrained(base, tmp_path / "saved")
        assert_same_number(first(loaded(**batch)), expected)
    whole.save_model()
    whole.create_model_card(dataset="words")  # which then lets the model write its part
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "library_name: peft" in card and "words" in card


def two_adapters():
    model = ours()
    model.add_adapter("other", peftkern.LoraConfig(task_type="CAUSAL_LM", r=2))
    return model


def prompted(config):
    torch.manual_seed(0)
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peftkern.get_peft_model(make("llama", dtype=torch.float64), config).double()


OTHERS = {
    "two adapters": two_adapters,
    "prefix": lambda: prompted(peftkern.PrefixTuningConfig),
    "prompt": lambda: prompted(peftkern.PromptTuningConfig),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_resume_and_give_the_best_model_back(kind, tmp_path):
    if kind == "two adapters":
        needs("transformers>=5.23", "Trainer resumes two adapters otherwise, HF PEFT's too")
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
    runs = []
    for resume in (None, tmp_path / "checkpoint-2"):
        trainer = Trainer(
            model=OTHERS[kind](),
            args=TrainingArguments(
                output_dir=tmp_path, max_steps=4, **{**ARGUMENTS, "learning_rate": 0.1}, **settings
            ),
            train_dataset=rows(),
            eval_dataset=rows(1),
        )
        runs.append((losses(trainer, resume), peft.get_peft_model_state_dict(trainer.model)))
    assert_same_number(runs[1][0], runs[0][0])
    assert len(runs[0][0]) == 4
    best = load_file(tmp_path / trainer.state.best_model_checkpoint / "adapter_model.safetensors")
    for _, state in runs:
        assert_same_number(state, best)
    assert not list(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert len(list(tmp_path.glob("checkpoint-2/other/*.safetensors"))) == (kind == "two adapters")


def test_the_callback_gives_the_model_back_if_it_is_asked_to(tmp_path):
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, **{**ARGUMENTS, "save_strategy": "no"}
    )
    model = theirs()
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *_, model, **__):
            seen.append(sum(row.fused for row in peftkern.explain(model)))

    callbacks = [peftkern.FuseCallback(unfuse_at_end=True), Look()]
    losses(Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks))
    assert seen == [14] and not any(row.fused for row in peftkern.explain(model))
    trainer = Trainer(
        model=make("llama"), args=arguments, train_dataset=rows(), callbacks=callbacks
    )
    with pytest.raises(ValueError, match="fuse: `model` must hold LoRA layers"):
        trainer.train()


@pytest.mark.parametrize("door", ["peftkern", "fused"])
def test_accelerate_prepares_saves_and_loads(door, tmp_path):
    model = ours() if door == "peftkern" else peftkern.fuse(theirs())
    accelerator = Accelerator(cpu=True)
    assert is_peft_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    batch = inputs("llama")

    def step():
        torch.manual_seed(1)
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step()
    accelerator.save_state(str(tmp_path / "state"))
    before = adapter(model)
    first_time = [step(), step()]
    assert first_time[0] != first_time[1]
    accelerator.load_state(str(tmp_path / "state"))
    assert_equal(adapter(model), before)
    assert [step(), step()] == first_time
    unwrapped = accelerator.unwrap_model(wrapped)
    assert unwrapped is model
    unwrapped.save_pretrained(
        tmp_path / "adapter",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(wrapped),
    )
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_equal(saved, peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_hf_pefts_functions_on_a_peftkern_model(kind):
    """accelerate's FSDP code hands the model that claims to be HF PEFT's to HF PEFT."""
    if kind == "lora":
        model = ours()
    else:
        config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peftkern.get_peft_model(make("llama"), config)
    state = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    assert_equal(state, peftkern.get_peft_model_state_dict(model))
    wanted = {name: value + 1 for name, value in state.items()}
    result = peft.set_peft_model_state_dict(model, wanted, adapter_name=model.active_adapter)
    assert kind == "prefix" or not result.unexpected_keys
    assert_equal(peftkern.get_peft_model_state_dict(model), wanted)


def test_pipeline():
    model = ours().eval()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    assert type(generator.model) is type(model)
    text = sentences(1)[0]
    found = generator(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = tokenizer()(text, return_tensors="pt")["input_ids"]
    wanted = theirs().eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    wanted = tokenizer().decode(wanted[0], skip_special_tokens=True)
    assert found.replace(" ", "") == wanted.replace(" ", "") and wanted.startswith(text)
