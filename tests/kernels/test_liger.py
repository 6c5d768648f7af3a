"""liger-kernel's own kernels beside adapters, in Triton's interpreter, against float64 models."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama import modeling_llama

import peftkern
from peftkern.cli import modelio
from peftkern.cli.errors import UserError
from peftkern.cli.settings import TrainSettings
from peftkern.cli.train import train
from peftkern.liger import FAMILIES, why_logits
from tests.closeness import assert_as_good_as_torch
from tests.liger import exactly, interpret, numbers
from tests.tiny import fill, inputs, make
from tests.trainers import ARGUMENTS, adapter, losses, sentences, tokenizer

pytest.importorskip("liger_kernel", reason='not installed: pip install "peftkern[liger]"')
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAMES = {"gemma3_text": "gemma3"}  # in tests/models.py
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ALL = f"liger-kernel {importlib.metadata.version('liger-kernel')}: norms (5), rope (in every llama"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch)


@pytest.fixture(autouse=True)
def own_functions():
    """Each test leaves transformers' modules as they were, for the others of this process."""
    names = {NAMES.get(family, family) for family in FAMILIES}
    modules = [
        importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in names
    ]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, own in zip(modules, before, strict=True):
        vars(module).update(own)


def adapted(family="llama", library=peftkern, config=None, dtype=torch.float32, task="CAUSAL_LM"):
    config = config or library.LoraConfig(task_type=task, **LORA)
    model = library.get_peft_model(make(family, task, dtype), copy.deepcopy(config))
    fill(model)
    return model.train()


def materialised(model, batch):
    """True when a training step computes logits."""
    return model.train()(**batch).logits is not None


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "family",
    [f if f == "llama" else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES],
)
def test_every_family_trains_as_without_liger(family):
    name = NAMES.get(family, family)
    plain = adapted(name)
    assert plain.config.model_type == family
    batch = inputs(name)
    before = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    assert_as_good_as_torch(numbers(model, batch), *before)
    said = peftkern.explain(model).liger
    assert "norms (" in said and "rope (" in said
    assert ("fused linear" in said.partition(";")[0]) == (family != "granite")
    assert materialised(model, batch) == (family == "granite")


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_the_order_adapters_liger_blocks(library):
    plain = adapted(library=library)
    batch = inputs("llama")
    expected, exact = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    report = peftkern.explain(model)
    assert len(report) == 14 and all(row.fused for row in report)
    assert report.liger == ALL + " of this process), fused linear cross-entropy"
    assert str(report).endswith(report.liger)
    whole = [row.name for row in report if "as one operation with its MLP" in row.reason]
    assert len(whole) == 6 and all(".mlp." in name for name in whole)
    # linears and MLPs are not liger's
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("MLP"):
            assert "forward" not in module.__dict__ and "liger" not in type(module).__module__
    assert_as_good_as_torch(numbers(model, batch), expected, exact)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_other_heads_keep_their_loss(task):
    plain = adapted(task=task)
    batch = inputs("llama", task)
    expected, exact = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    assert "has another loss" in peftkern.explain(model).liger
    assert_as_good_as_torch(numbers(model, batch), expected, exact)


@pytest.mark.parametrize(
    "config",
    [
        peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peftkern.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
        ),
        peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "p-tuning", "prefix"],
)
def test_prompts_with_padded_labels(config):
    plain = adapted(config=config)
    batch = inputs("llama")
    expected, exact = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    assert not materialised(model, batch)
    assert_as_good_as_torch(numbers(model, batch), expected, exact)


# --------------------------------------------------------------------------- the head's call


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head has an adapter"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "lm_head has an adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    ],
    ids=["lora", "dora", "in full"],
)
def test_an_adapted_head(library, settings, reason):
    """Reading the weight of an adapted lm_head, as liger does, would lose its adapter."""
    plain = adapted(library=library, config=library.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():  # a copy that differs from the original
        for name, weight in plain.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1.5)
    batch = inputs("llama")
    expected, exact = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    assert why_logits(model.get_base_model()) == reason
    assert (reason or "fused linear cross-entropy") in peftkern.explain(model).liger
    assert materialised(model, batch) == (reason is not None)
    assert any("lm_head" in name for name in expected)
    assert_as_good_as_torch(numbers(model, batch), expected, exact)


def test_the_head_is_looked_at_in_every_call(caplog):
    model = adapted()
    peftkern.fuse(model, liger=True)
    base, batch = model.get_base_model(), inputs("llama")
    assert not materialised(model, batch)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    model.add_adapter("later", config)
    with caplog.at_level(logging.INFO, logger="peftkern"):
        assert materialised(model, batch)
    assert why_logits(base) == "lm_head has an adapter"
    model.delete_adapter("later")
    model = peftkern.fuse(adapted(), liger=True)
    base = model.get_base_model()
    handle = base.lm_head.register_forward_hook(lambda *_: None)
    assert materialised(model, batch) and "hooks" in why_logits(base)
    handle.remove()
    assert not materialised(model, batch)
    base.loss_function = lambda logits, **_: logits.sum()
    assert materialised(model, batch) and "loss_function" in why_logits(base)
    del base._loss_function
    base.lm_head.bias = nn.Parameter(torch.zeros(base.lm_head.out_features))
    assert materialised(model, batch) and why_logits(base) == "lm_head has a bias"
    model.eval()
    assert model(**batch).logits is not None


def test_a_head_of_hf_peft_under_another_name():
    """liger reads the copy called "default", so another must not be asked of it."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(make("llama"), config, adapter_name="mine")
    peftkern.fuse(model, liger=True)
    assert materialised(model, inputs("llama"))
    assert "not called default" in peftkern.explain(model).liger


def test_norms_that_train_are_left_out():
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["norm"]
    )
    plain = adapted(config=config)
    batch = inputs("llama")
    expected, exact = numbers(plain, batch), exactly(plain, batch)
    model = peftkern.fuse(copy.deepcopy(plain), liger=True)
    assert "; not norms: model.norm trains beside an adapter" in peftkern.explain(model).liger
    assert_as_good_as_torch(numbers(model, batch), expected, exact)


# ----------------------------------------------------------------- other models, and undoing it


def test_other_models_of_the_family_are_as_they_were():
    rope, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    first, second, other = adapted(), adapted(), adapted()
    peftkern.fuse(first, liger=True)
    peftkern.fuse(second, liger=True)
    assert modeling_llama.LlamaRMSNorm is norm and modeling_llama.apply_rotary_pos_emb is not rope
    signature = inspect.signature
    assert signature(modeling_llama.apply_rotary_pos_emb) == signature(rope)
    for module in other.modules():
        assert "forward" not in module.__dict__
    assert peftkern.explain(other).liger is None
    peftkern.unfuse(first)
    assert peftkern.explain(first).liger is None
    assert "rope" in peftkern.explain(second).liger
    assert modeling_llama.apply_rotary_pos_emb is not rope
    peftkern.unfuse(second)
    assert modeling_llama.apply_rotary_pos_emb is rope


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_unfuse_takes_all_of_it_out(library):
    model = adapted(library=library)
    batch = inputs("llama")
    names = [(m, set(m.__dict__)) for m in model.get_base_model().modules()]
    expected = numbers(model, batch)
    peftkern.fuse(model, liger=True)
    peftkern.fuse(model, liger=True)  # again changes nothing
    assert materialised(copy.deepcopy(model), batch) is False
    peftkern.unfuse(model)
    added = {n for m, before in names for n in set(m.__dict__) - before}
    assert not {n for n in added if "liger" in n} and not added & {"forward", "casting_mode"}
    found = numbers(model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_forward_replaced_later_is_not_undone():
    model = peftkern.fuse(adapted(), liger=True)
    norm = model.get_base_model().model.norm
    norm.forward = functools.partial(norm.forward)
    with pytest.raises(RuntimeError, match="the forward of a LlamaRMSNorm was replaced"):
        peftkern.unfuse(model)
    assert "fused linear" in peftkern.explain(model).liger


# ------------------------------------------------------------------------------ trainers


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = inputs("llama", batch=4)["input_ids"][i]
        return {"input_ids": ids, "labels": ids}


def trained(model, out, callbacks=(), **arguments):
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=2, **{**ARGUMENTS, **arguments}
    )
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=Data(), callbacks=list(callbacks)
    )
    assert all(0 < loss < 10 for loss in losses(trainer))
    return model


def assert_same_steps(start, model, plain, exact):
    """The adapter's way from ``start`` is as near to that of the float64 model as the plain one."""
    begun = adapter(start)
    assert_as_good_as_torch(
        *(
            {name: weight - begun[name] for name, weight in adapter(m).items()}
            for m in (model, plain, exact)
        )
    )


@pytest.mark.long
@pytest.mark.parametrize("how", ["fuse", "callback", "Trainer", "both"])
def test_trainer(how, tmp_path):
    """Two steps end with weights as near to float64's as those without liger.

    ``use_liger_kernel=True`` finds the base model in a PeftModel of ours.
    """
    start = adapted()
    plain = {"plain": copy.deepcopy(start), "exact": copy.deepcopy(start).double()}
    for name, model in plain.items():
        trained(model, tmp_path / name)
    model, arguments, callbacks = copy.deepcopy(start), {}, []
    if how in ("fuse", "both"):
        peftkern.fuse(model, liger=True)
    if how == "callback":
        callbacks = [peftkern.FuseCallback(liger=True, unfuse_at_end=False)]
    if how in ("Trainer", "both"):
        arguments = {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": False}}
    trained(model, tmp_path / how, callbacks, **arguments)
    assert peftkern.explain(model).liger.endswith("fused linear cross-entropy")
    assert_same_steps(start, model, plain["plain"], plain["exact"])


def test_trainers_own_liger_is_said_to_be_wrong_on_an_adapted_head(tmp_path):
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model = trained(adapted(config=config), tmp_path, use_liger_kernel=True)
    said = peftkern.explain(model).liger
    assert "other modules (2)" in said  # its MLPs
    assert said.endswith("fused linear cross-entropy, WRONG here: lm_head has an adapter")


@pytest.mark.long
def test_trl_keeps_its_own_loss(tmp_path):
    """TRL replaces the model's forward by one with a fused head of its own."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    start = adapted()
    models = [copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start).double()]
    model = models[0]
    for each in models:
        trainer = trl.SFTTrainer(
            model=each,
            args=trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, max_length=16, **ARGUMENTS),
            train_dataset=datasets.Dataset.from_dict({"text": sentences()}),
            processing_class=tokenizer(),
            callbacks=[peftkern.FuseCallback(liger=True)] if each is model else [],
        )
        losses(trainer)
    assert_same_steps(start, *models)
    said = peftkern.explain(model).liger
    assert "norms (5), rope" in said
    assert said.endswith("not fused linear cross-entropy: the model's forward was replaced")


# ------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    root = tmp_path_factory.mktemp("liger")
    for family in ("llama", "gpt2"):
        make(family).save_pretrained(root / family)
        tokenizer().save_pretrained(root / family)
    (root / "data.txt").write_text("\n".join(sentences(8)))

    def run(out, model="llama", **more):
        settings = {"steps": 2, "batch_size": 2, "lora_r": 4, "eval_split": 0.25, "cpu": True}
        return train(
            TrainSettings(
                model=str(root / model),
                data=str(root / "data.txt"),
                out=str(out),
                **{**settings, **more},
            )
        )

    return SimpleNamespace(run=run, root=root)


@pytest.mark.long
def test_peftkern_train(command, tmp_path, monkeypatch):
    seen = []

    def load(*args):
        return modelio.load_model(*args).to(seen[-1])

    monkeypatch.setattr("peftkern.cli.prepare.load_model", load)
    said, weights = [], []
    real = peftkern.fuse
    monkeypatch.setattr(
        "peftkern.fusing.fuse",
        lambda model, liger: said.append(peftkern.explain(real(model, liger=liger)).liger),
    )
    for name, dtype in (
        ("liger", torch.float32),
        ("plain", torch.float32),
        ("exact", torch.double),
    ):
        seen.append(dtype)
        command.run(tmp_path / name, liger=name == "liger")
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        weights.append({key: t for key, t in saved.items() if "lora_B" in key})  # from zero
    assert len(said) == 1 and said[0].endswith("fused linear cross-entropy")
    assert all(t.dtype == torch.double and t.any() for t in weights[2].values())
    assert_as_good_as_torch(*weights)
    with pytest.raises(UserError, match="--liger was True there and is False now"):
        command.run(tmp_path / "liger")


def test_peftkern_train_refuses_another_family(command, tmp_path):
    with pytest.raises(UserError, match=r"^--liger: the model type must be one of .*; got 'gpt2'"):
        command.run(tmp_path / "out", model="gpt2", liger=True)
    assert not (tmp_path / "out").exists()
