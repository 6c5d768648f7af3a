"""The ways into and out of models that transformers has loaded in 4 or 8 bit with bitsandbytes."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import peftkern
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import dense, step
from tests.trainers import ARGUMENTS, tokenizer
from tests.trainers import losses as trainer_losses

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
HOW: dict[str, dict[str, Any]] = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8bit": dict(load_in_8bit=True),
}
LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: Any = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module", params=HOW)
def loaded(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    config = BitsAndBytesConfig(**HOW[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    model.bits = request.param
    yield model


def drawn(model: Any) -> Any:
    """The model with an adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, w in model.named_parameters():
        if "lora_B" in name:
            w.data.normal_(std=0.1, generator=generator)
    return model


def ours(loaded: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    config = peftkern.LoraConfig(**{**LORA, **more})
    return drawn(peftkern.get_peft_model(copy.deepcopy(loaded), config))


def theirs(loaded: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return drawn(peft.get_peft_model(copy.deepcopy(loaded), peft.LoraConfig(**{**LORA, **more})))


def test_what_a_model_says_of_itself(loaded: Any) -> None:
    model = ours(loaded)
    rows = peftkern.explain(model)
    assert len(rows) == 14 and all(row.fused for row in rows)
    assert model.get_model_status().quantization_backend == f"bnb {loaded.bits}"
    assert getattr(model, f"is_loaded_in_{loaded.bits}")
    base = theirs(loaded)
    assert type(base.base_model.model.model.layers[0].mlp.up_proj).__name__.startswith("Linear")
    counts = model.get_nb_trainable_parameters(), base.get_nb_trainable_parameters()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_prepared_for_training_with_checkpoints(loaded: Any, reentrant: bool) -> None:
    plain = copy.deepcopy(loaded)
    exact = step(theirs(dense(loaded)).double(), IDS)
    options = {"use_reentrant": reentrant}
    found = []
    for library, adapt in ((peftkern, ours), (peft, theirs)):
        base = library.prepare_model_for_kbit_training(  # type: ignore[attr-defined]
            copy.deepcopy(plain), gradient_checkpointing_kwargs=options
        )
        assert base.is_gradient_checkpointing
        found.append((base, step(adapt(base), IDS)))
    dtypes = [[p.dtype for p in base.parameters()] for base, _ in found]
    assert dtypes[0] == dtypes[1]
    assert_as_good_as_torch(found[0][1], found[1][1], exact)


def test_casts_leave_packed_weights_alone(loaded: Any) -> None:
    model = ours(loaded)
    before = {n: w.clone() for n, w in model.named_parameters() if "base_layer" in n}
    peftkern.utils.other.cast_mixed_precision_params(model, torch.bfloat16)
    after = dict(model.named_parameters())
    assert before and all(torch.equal(w, after[n]) for n, w in before.items())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    # TRL's casting of adapters for QLoRA
    for name, w in model.named_parameters():
        if "lora_" in name:
            w.data = w.data.to(torch.bfloat16)
    rows = peftkern.explain(model)
    assert all(row.fused for row in rows)
    got = step(model, IDS)
    assert got.keys() > {"logits"} and all(t.isfinite().all() for t in got.values())


def test_trainer_trains_it_as_hf_pefts(loaded: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(0, 64, (8, 6)).tolist()]
    losses = []
    for model in (ours(loaded), theirs(loaded)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=True, dataloader_pin_memory=False,
            gradient_checkpointing_kwargs={"use_reentrant": False}, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_adapters_are_saved_and_loaded_on_it(loaded: Any, tmp_path: Path) -> None:
    model = ours(loaded)
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(copy.deepcopy(loaded), str(tmp_path))
    by_hf = peft.PeftModel.from_pretrained(copy.deepcopy(loaded), str(tmp_path))
    held = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    for other in (again, by_hf):
        state = other.state_dict()
        assert held and all(torch.equal(state[k], v) for k, v in held.items())
    with torch.no_grad():
        assert torch.equal(again.train()(IDS).logits, model.train()(IDS).logits)


@pytest.fixture
def fused(loaded: Any) -> tuple[Any, Any]:
    plain = theirs(loaded)
    return peftkern.fuse(copy.deepcopy(plain)), plain


def layer(model: Any) -> Any:
    return model.base_model.model.model.layers[1].mlp.down_proj


def test_fuse_takes_hf_pefts_layers_on_bitsandbytes(loaded: Any, fused: Any) -> None:
    model, plain = fused
    kind = f"Linear{loaded.bits if loaded.bits == '4bit' else '8bitLt'}"
    assert type(layer(plain)).__module__ == "peft.tuners.lora.bnb"
    assert type(layer(plain)).__name__ == kind and isinstance(layer(model), type(layer(plain)))
    rows = peftkern.explain(model)
    assert len(rows) == 14 and all(row.fused for row in rows)
    assert any("trains as one operation with its MLP" in row.reason for row in rows)
    exact = peft.get_peft_model(dense(loaded), peft.LoraConfig(**LORA)).double()
    held = {k: v for k, v in plain.state_dict().items() if "lora_" in k}
    exact.load_state_dict(held, strict=False)
    assert_as_good_as_torch(step(model, IDS), step(plain, IDS), step(exact, IDS))
    again = pickle.loads(pickle.dumps(layer(model)))
    assert type(again) is type(layer(model))
    peftkern.unfuse(model)
    assert type(layer(model)) is type(layer(plain))


def test_a_fused_model_keeps_hf_pefts_api(loaded: Any, fused: Any) -> None:
    model, plain = fused

    def logits(m: Any, **more: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = m.train()(IDS, **more).logits
        return found

    for m in (model, plain):
        torch.manual_seed(2)
        m.add_adapter("second", peft.LoraConfig(**LORA))
        m.set_adapter("second")
        drawn(m)
    torch.testing.assert_close(logits(model), logits(plain))
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    for m in (model, plain):
        m.delete_adapter("second")
        m.set_adapter("default")
    torch.testing.assert_close(logits(model), logits(plain))
    names = ["default", "__base__"]
    with torch.no_grad():
        found = [m.eval()(IDS, adapter_names=names).logits for m in (model, plain)]
    # bitsandbytes rounds activations in eval mode, to 8 bits or on some CPUs to bfloat16
    error = (found[0] - found[1]).abs().max()
    assert error < 0.05 * found[1].abs().max()


@pytest.mark.parametrize("whose", ["ours", "hf"])
def test_trl_casts_adapters_for_qlora(loaded: Any, tmp_path: Path, whose: str) -> None:
    """TRL gives a quantised model adapters in bfloat16, and runs under autocast."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = torch.randint(3, 60, (8, 6)).tolist()
    base = copy.deepcopy(loaded)
    arguments = {**ARGUMENTS, "bf16": True, "max_steps": 3}
    trainer = trl.SFTTrainer(
        model=ours(loaded) if whose == "ours" else base,
        args=trl.SFTConfig(output_dir=str(tmp_path), max_length=16, **arguments),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer(),
        peft_config=None if whose == "ours" else peft.LoraConfig(**LORA),
        callbacks=[] if whose == "ours" else [peftkern.FuseCallback()],
    )
    adapters = [w for n, w in trainer.model.named_parameters() if "lora_" in n]
    assert {w.dtype for w in adapters} == {torch.bfloat16}
    losses = trainer_losses(trainer)
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    rows = peftkern.explain(trainer.model)
    assert all(row.fused for row in rows), rows[0]
