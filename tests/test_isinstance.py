"""isinstance checks for an HF PEFT model accept a peftkern model; without HF PEFT all works too.

Trainers that check are in test_trainer.py and test_trl.py.
"""

from __future__ import annotations

import copy
import pickle
import sys
import textwrap

import peft
import pytest
import torch

import peftkern
from tests import children
from tests.closeness import assert_same_number
from tests.tiny import CASES, first, inputs, make, pair

BY_TASK = {task: family for family, task in CASES} | {None: "bert"}


@pytest.mark.parametrize("task", BY_TASK)
def test_is_both_ours_and_pefts(task):
    ours, theirs = pair(BY_TASK[task], task)
    assert isinstance(ours, peft.PeftModel) and isinstance(ours, peftkern.PeftModel)
    assert isinstance(ours, type(theirs)) and isinstance(ours, torch.nn.Module)
    assert (
        type(ours).__module__.startswith("peftkern")
        and type(ours).__name__ == type(theirs).__name__
    )
    assert not isinstance(ours, peft.PeftMixedModel) and not isinstance(theirs, peftkern.PeftModel)
    if task != "CAUSAL_LM":
        assert not isinstance(ours, peft.PeftModelForCausalLM)
    # the class that isinstance() sees has our methods
    for name in ("forward", "generate", "save_pretrained", "load_adapter", "get_base_model"):
        assert getattr(ours.__class__, name).__module__.startswith("peftkern"), name


def test_what_trainer_and_accelerate_ask():
    from accelerate.utils import extract_model_from_parallel
    from transformers.trainer_utils import unwrap_peft_model

    ours, _ = pair("llama")
    assert unwrap_peft_model(ours) is ours.get_base_model()
    assert extract_model_from_parallel(ours) is ours


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, tmp_path):
    ours, _ = pair("gpt2", "SEQ_CLS", lora_dropout=0.1)
    ours.add_adapter("second", peftkern.LoraConfig(r=2, task_type="SEQ_CLS"))
    ours.eval()
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        torch.save(ours, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(twin) is type(ours) and isinstance(twin, peft.PeftModel)
    batch = inputs("gpt2", "SEQ_CLS")
    assert torch.equal(first(twin(**batch)), first(ours(**batch)))
    assert twin.peft_config == ours.peft_config and twin.peft_config is not ours.peft_config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert first(ours(**batch)).abs().sum() > 0
    assert twin.get_base_model().peft_config is twin.peft_config  # transformers looks there


def run(code, block):
    """Run ``code`` in a process of its own, in which the modules ``block`` cannot be imported."""
    prelude = f"import sys\nsys.modules.update(dict.fromkeys({block!r}))\n"
    done = children.python("-c", prelude + textwrap.dedent(code), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_without_hf_peft(tmp_path):
    """The whole way, in a process that cannot import peft; its files are then read by HF PEFT."""
    make("llama", dtype=torch.float64).save_pretrained(tmp_path / "base")
    code = f"""
    import copy, os, pickle, torch, peftkern
    from transformers import AutoModelForCausalLM
    os.chdir({str(tmp_path)!r})
    base = lambda: AutoModelForCausalLM.from_pretrained("base", dtype=torch.float64)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peftkern.get_peft_model(base(), config)
    assert model.__class__ is type(model) is peftkern.PeftModelForCausalLM
    assert isinstance(model, peftkern.PeftModel)
    ids = torch.arange(6)[None]
    model(ids, labels=ids).loss.backward()
    model.eval()
    model.save_pretrained("adapter")
    again = peftkern.PeftModel.from_pretrained(base(), "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    torch.save(model(ids).logits, "logits.pt")
    assert len(peftkern.explain(model)) == 4 and sys.modules["peft"] is None
    assert peftkern.fuse(model) is model and peftkern.FuseCallback()
    try:
        peftkern.fuse(base())
    except ValueError as e:
        assert "must hold LoRA layers of HF PEFT" in str(e)
    else:
        raise AssertionError("a model without adapters was fused")
    """
    run(code, ["peft"])
    theirs = peft.PeftModel.from_pretrained(
        make("llama", dtype=torch.float64), tmp_path / "adapter"
    )
    expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert_same_number(theirs(torch.arange(6)[None]).logits, expected)


@pytest.mark.long
def test_peft_imported_after_the_model_was_made():
    code = """
    import torch, peftkern
    config = peftkern.LoraConfig(target_modules=["0"])
    model = peftkern.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    assert "peft" not in sys.modules
    before = model.__class__
    import peft
    assert before is type(model) is peftkern.PeftModel and isinstance(model, peft.PeftModel)
    model(torch.ones(1, 4)).sum().backward()
    """
    run(code, [])


def test_base_model_of_a_peftkern_model_is_the_callers_own():
    base = make("bert", "SEQ_CLS")
    ours, _ = pair("bert", "SEQ_CLS", base=base)
    assert ours.get_base_model() is base and ours.base_model.model is base
    assert ours.config is base.config and ours.device == base.device and ours.dtype == base.dtype


@pytest.mark.parametrize("hf_peft", [True, False])
def test_a_model_sharded_by_fsdp2(hf_peft, tmp_path, monkeypatch):
    """fully_shard derives a class from ``model.__class__`` and sets it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    ours, theirs = (model.double() for model in pair("llama"))
    batch = inputs("llama")
    expected = theirs(**batch).logits
    if not hf_peft:
        monkeypatch.delitem(sys.modules, "peft")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(ours, mesh=init_device_mesh("cpu", (1,)))
        assert_same_number(ours(**batch).logits, expected)
    finally:
        dist.destroy_process_group()
    assert isinstance(ours, FSDPModule) and isinstance(ours, peftkern.PeftModelForCausalLM)
    assert isinstance(ours, peft.PeftModelForCausalLM) == hf_peft
    assert not any(base.__module__.startswith("peft.") for base in type(ours).__mro__)
    assert isinstance(ours.base_model, torch.nn.Module) and ours.active_adapter == "default"
