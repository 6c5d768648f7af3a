"""``AutoPeftModel*``: the base model from the adapter's configuration."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf

import peftkern
from peftkern.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from tests.closeness import assert_same_number
from tests.tiny import fill, first, inputs, make

CLASSES = {
    "CAUSAL_LM": ("llama", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("t5", "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("bert", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("bert", "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": ("bert", "AutoPeftModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("bert", "AutoPeftModelForFeatureExtraction"),
    None: ("llama", "AutoPeftModel"),
}


def saved(tmp_path, family="llama", task="CAUSAL_LM", dtype=torch.float32, **settings):
    """A base model and an adapter for it on disk, and the adapted model."""
    make(family, task, dtype).save_pretrained(tmp_path / "base")
    base = type(make(family, task)).from_pretrained(tmp_path / "base")
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type=task, **settings))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


@pytest.mark.parametrize("task", list(CLASSES), ids=str)
def test_every_class_loads_base_and_adapter(task, tmp_path, monkeypatch):
    family, name = CLASSES[task]
    model = saved(tmp_path, family, task, torch.float64)
    loaded = getattr(peftkern, name).from_pretrained(tmp_path / "adapter")
    assert type(loaded) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, peftkern.PeftModel)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    monkeypatch.chdir(tmp_path / "adapter")  # "../base" is seen from there
    theirs = getattr(peft, name).from_pretrained(".")
    call = inputs(family, task)
    with torch.no_grad():
        want, got, other = (first(m(**call)) for m in (model, loaded, theirs))
    assert_same_number(got, want)
    assert_same_number(got, other)


def test_arguments_reach_base_and_adapter(tmp_path):
    saved(tmp_path)
    model = peftkern.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", "mine", True, dtype=torch.bfloat16
    )
    assert model.active_adapters == ["mine"]
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["mine"].weight.requires_grad
    assert layer.lora_A["mine"].weight.dtype == torch.float32


def tokenizer_of(length, folder):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(length)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tf.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.mark.parametrize("length, rows", [(70, 70), (10, 64)])
def test_embeddings_grow_to_the_tokenizer_and_never_shrink(length, rows, tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(rows)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM")
    peftkern.get_peft_model(base, config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=rows != 64
    )
    tokenizer_of(length, tmp_path / "adapter")
    model = peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == rows


def test_what_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(OSError, match="from_pretrained"):
        peftkern.AutoPeftModelForCausalLM()
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        peftkern.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="specific class for your task type"):
        peftkern.AutoPeftModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"parent_library": "os", "base_model_class": "system"}, "not in the import allowlist"),
        ({"parent_library": "transformersx", "base_model_class": "A"}, "import allowlist"),
        ({"parent_library": 3, "base_model_class": "A"}, "auto_mapping"),
        ({"parent_library": "transformers"}, "auto_mapping"),
        (None, "Cannot infer the auto class"),
    ],
)
def test_a_configuration_cannot_have_just_anything_imported(mapping, message, tmp_path):
    saved(tmp_path, task=None)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping}))
    with pytest.raises(ValueError, match=message):
        peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_allowed_library_of_the_users(tmp_path):
    """A model class from elsewhere needs its library named."""
    saved(tmp_path, task=None)
    path = tmp_path / "adapter" / "adapter_config.json"
    mapping = {"parent_library": "tests.tiny", "base_model_class": "torch"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping}))
    with pytest.raises(ValueError, match="tests.tiny"):
        peftkern.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(AttributeError, match="from_pretrained"):  # imported, and no model class
        peftkern.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["tests"])


def test_a_tokenizer_of_which_a_part_is_missing(tmp_path, monkeypatch):
    def without_network(*args, **kwargs):
        raise OSError("cannot connect")

    saved(tmp_path)
    tokenizer_of(70, tmp_path / "adapter")
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", without_network)
    with pytest.warns(UserWarning, match="tokenizer of .* cannot be loaded"):
        model = peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == 64


def test_arguments_for_the_adapter_alone_do_not_reach_the_base_model(tmp_path):
    saved(tmp_path)
    model = peftkern.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.bfloat16, autocast_adapter_dtype=False, torch_device="cpu"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
