"""TRL's trainers, which get a peftkern model, or build HF PEFT's model that the callback fuses.

They build the latter from ``peft_config=``.
"""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import first, inputs, make
from tests.trainers import (
    ARGUMENTS,
    CHECKPOINTING,
    LORA,
    adapter,
    assert_equal,
    logged,
    losses,
    ours,
    sentences,
    theirs,
    tokenizer,
)

# both need Python 3.11
trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset
DPOConfig, DPOTrainer, SFTConfig, SFTTrainer = (
    getattr(trl, name) for name in ("DPOConfig", "DPOTrainer", "SFTConfig", "SFTTrainer")
)


@pytest.fixture(autouse=True)
def quiet():
    import datasets

    datasets.disable_progress_bars()


def sft(model, out, steps=4, config=None, callbacks=(), **arguments):
    """A trainer on eight lines; with ``config`` it puts HF PEFT's adapter in itself."""
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(out), max_steps=steps, max_length=16, **{**ARGUMENTS, **arguments}
        ),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        eval_dataset=Dataset.from_dict({"text": sentences(seed=1)}),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )


def lora(library=peft, **more):
    return library.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **more})


def by(door, out, **arguments):
    """The trainer of a door; the same weights in all of them."""
    dtype = arguments.pop("dtype", torch.float64)
    if door == "a peftkern model":
        return sft(ours(dtype), out, **arguments)
    if door == "HF PEFT's model":
        return sft(theirs(dtype), out, **arguments)
    callbacks = [peftkern.FuseCallback()] if door.endswith("fused") else []
    library = peftkern if door.startswith("our") else peft
    config = lora(library, init_lora_weights="gaussian")
    return sft(make("llama", dtype=dtype), out, config=config, callbacks=callbacks, **arguments)


def run(name, out, fused, **arguments):
    """(losses, the adapter afterwards) of a training."""
    trainer = by(name, out, save_strategy="no", **arguments)
    found = losses(trainer), adapter(trainer.model)
    assert sum(row.fused for row in peftkern.explain(trainer.model)) == (14 if fused else 0)
    return found


@pytest.mark.parametrize(
    ("door", "beside", "arguments"),
    [
        ("a peftkern model", "HF PEFT's model", {}),
        ("peft_config, fused", "peft_config", {}),
        ("our peft_config, fused", "peft_config", {}),
        ("peft_config, fused", "peft_config", {CHECKPOINTING: True}),
    ],
    ids=["door 1", "door 2", "door 3", "checkpointing"],
)
def test_sft_losses_are_hf_pefts(door, beside, arguments, tmp_path):
    ours, theirs = (run(name, tmp_path, name == door, **arguments) for name in (door, beside))
    assert_same_number(ours, theirs)
    assert len(ours[0]) == 4


def test_sft_in_bfloat16_with_packing_is_as_good_as_hf_pefts(tmp_path):
    """With SGD: Adam's steps have the size of the learning rate even where a gradient is noise."""
    doors, settings = ("a peftkern model", "HF PEFT's model"), {"packing": True, "optim": "sgd"}
    half = {"dtype": torch.bfloat16, "bf16": True}
    found = [run(name, tmp_path, name == doors[0], **half, **settings)[1] for name in doors]
    assert_as_good_as_torch(*found, run(doors[1], tmp_path, False, **settings)[1])


@pytest.mark.parametrize("door", ["a peftkern model", "peft_config, fused"])
def test_sft_checkpoint_resume_best_model_and_save(door, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
    whole = by(door, tmp_path / "whole", steps=6, **settings)
    uninterrupted = losses(whole)
    evaluated = {r["step"]: r["eval_loss"] for r in whole.state.log_history if "eval_loss" in r}
    best = max(evaluated, key=evaluated.get)  # the worst one, which is not the last
    assert best != 6
    folder = tmp_path / "whole" / f"checkpoint-{best}"
    assert_equal(
        peft.get_peft_model_state_dict(whole.model),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert not (folder / "model.safetensors").exists()

    again = by(door, tmp_path / "whole", steps=6, **settings)
    resumed = losses(again, tmp_path / "whole" / "checkpoint-2")
    assert_same_number(resumed, uninterrupted)
    assert len(resumed) == 6
    assert sum(row.fused for row in peftkern.explain(again.model)) == 14

    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    batch = inputs("llama")
    expected = first(whole.model.eval()(**batch))
    for library in (peft, peftkern):
        base = make("llama", dtype=torch.float64)
        loaded = library.PeftModel.from_pretrained(base, tmp_path / "saved")
        assert_same_number(first(loaded(**batch)), expected)


def test_rules_of_trl(tmp_path):
    """An adapter on lm_head is refused, as TRL's losses would ignore it."""
    on_head = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(peftkern.get_peft_model(make("llama"), on_head), tmp_path)
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        sft(ours(), tmp_path, config=lora())


@pytest.mark.parametrize("door", ["a peftkern model", "peft_config, fused"])
def test_dpo_takes_the_model_without_its_adapter_as_reference(door, tmp_path):
    data = {"prompt": sentences(8, 3, 5), "chosen": sentences(8, 3, 6),
            "rejected": sentences(8, 3, 7)}  # fmt: skip
    runs = []
    for name in (door, "peft_config" if door.startswith("peft_config") else "HF PEFT's model"):
        given = {"a peftkern model": ours, "HF PEFT's model": theirs}.get(name)
        config = lora(init_lora_weights="gaussian") if given is None else None
        model = make("llama", dtype=torch.float64) if given is None else given()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=str(tmp_path), max_steps=3, **{**ARGUMENTS, "save_strategy": "no"}
            ),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer(),
            peft_config=config,
            callbacks=[peftkern.FuseCallback()] if "fused" in name else [],
        )
        runs.append((losses(trainer), logged(trainer, "rewards/margins")))
        fused = sum(row.fused for row in peftkern.explain(trainer.model))
        assert fused == (14 if name == door else 0)
    assert_same_number(*runs)
    assert len(runs[0][0]) == 3 and any(runs[0][1])
