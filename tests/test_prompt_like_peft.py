"""Details of HF PEFT's prompt learning that its own tests, or its callers, rely on."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import peftkern
from tests.closeness import assert_same_number
from tests.plain_reference import peft_is_right
from tests.prompts import plain, prompt_model, prompt_pair, virtual_tokens
from tests.tiny import make

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def big(*models: Any) -> None:
    """Prefixes that show, the same in all."""
    for model in models:
        with torch.no_grad():
            for encoder in model.prompt_encoder.values():
                encoder.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))


def test_position_ids_are_moved_before_the_model_is_called(monkeypatch):
    """Whoever stands between sees the positions that count, and the numbers are HF PEFT's."""
    ours, theirs = prompt_pair("prefix")
    big(ours, theirs)
    ours.add_adapter("other", copy.deepcopy(ours.peft_config["default"]))
    ours.eval(), theirs.eval()
    P = ours.peft_config["default"].num_virtual_tokens
    seen = []
    run = ours.base_model.forward

    def forward(*args, **kwargs):
        seen.append(kwargs.get("position_ids"))
        return run(*args, **kwargs)

    where = torch.tensor([[0, 1, 2, 5], [3, 4, 5, 6]])
    call = {"input_ids": IDS, "position_ids": where, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(ours.base_model, "forward", forward)
        mine = ours(**call).logits
        mixed = ours(**call, adapter_names=["__base__", "default"]).logits
        ours(**call, adapter_names=["__base__", "__base__"])
        ours(IDS)
    assert_same_number(mine, theirs(**call).logits)
    assert torch.equal(seen[0], where + P)
    assert torch.equal(seen[1], where + torch.tensor([[0], [P]]))
    assert torch.equal(seen[2], where)
    assert_same_number(mixed[1], mine[1])
    with torch.no_grad(), ours.disable_adapter():
        assert_same_number(mixed[0], ours(**call).logits[0])
    assert torch.equal(call["position_ids"], where)  # the caller's own are as they were
    assert seen[3] is None


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_seq2seq_generates_from_keywords_alone(kind):
    if kind == "lora":
        config = peftkern.LoraConfig(task_type="SEQ_2_SEQ_LM")
        model = peftkern.get_peft_model(make("t5", "SEQ_2_SEQ_LM"), config)
    else:
        model = prompt_model(peftkern, kind, "t5", "SEQ_2_SEQ_LM")
    assert model.generate(input_ids=IDS, max_new_tokens=2).shape[0] == 2
    with pytest.raises(TypeError, match="positional"):
        model.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_question_answering_drops_token_types(kind):
    """As HF PEFT, which says nothing."""
    ours, theirs = prompt_pair(kind, "bert", "QUESTION_ANS")
    if kind == "prefix":
        big(ours, theirs)
    ours.eval(), theirs.eval()
    types = torch.tensor([[0, 0, 1, 1]] * 2)
    base = make("bert", "QUESTION_ANS", torch.float64)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="Token type ids are not supported"):
            mine = ours(IDS, token_type_ids=types).start_logits
        assert torch.equal(mine, ours(IDS).start_logits)
        expected = plain(kind, ours, virtual_tokens(ours))(base)(input_ids=IDS)
        assert_same_number(mine, expected.start_logits)
        if kind != "prefix" or peft_is_right("prefix of a head"):
            assert_same_number(mine, theirs(IDS, token_type_ids=types).start_logits)


def test_question_answering_with_lora_has_token_types():
    """HF PEFT drops these too; here they reach the model, which was trained with them."""
    base = make("bert", "QUESTION_ANS").eval()
    types = torch.tensor([[0, 0, 1, 1]] * 2)
    with torch.no_grad():
        expected = base(IDS, token_type_ids=types).start_logits
        config = peftkern.LoraConfig(task_type="QUESTION_ANS")
        model = peftkern.get_peft_model(base, config).eval()
        assert torch.equal(model(IDS, token_type_ids=types).start_logits, expected)
        assert not torch.equal(model(IDS).start_logits, expected)


class Foreign(nn.Module):
    """No transformers model: its configuration is a mapping of its own."""

    class Config(dict):
        vocab_size = 10

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.layer = nn.Linear(10, 10)

    def prepare_inputs_for_generation(self) -> None: ...


def test_a_prefix_of_a_model_that_is_none_of_transformers(tmp_path):
    """Its sizes have to be said; then it can be made, saved and loaded, and a call is refused."""
    sizes = {"num_layers": 2, "token_dim": 10, "num_attention_heads": 2}
    config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    model = peftkern.get_peft_model(Foreign(), config)
    big(model)
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(Foreign(), str(tmp_path))
    weight = again.prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, model.prompt_encoder["default"].embedding.weight)
    assert weight.shape == (5, 40)
    with pytest.raises(ValueError, match="transformers model; a Foreign"):
        again(input_ids=IDS)
    del sizes["num_layers"]
    config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    with pytest.raises(ValueError, match="transformers model; a Foreign"):
        peftkern.get_peft_model(Foreign(), config)


@pytest.mark.parametrize("kind", ["sample", "prompt", "prefix"])
def test_weights_that_are_elsewhere(kind):
    """accelerate keeps the weights of the model and fetches them for each layer."""
    base = make("llama").eval()
    whole = prompt_model(peftkern, kind, base=copy.deepcopy(base)).eval()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in base.parameters())
    torch.manual_seed(0)
    model = prompt_model(peftkern, kind, base=base).eval()
    assert not any(p.is_meta for p in model.prompt_encoder.parameters())
    if kind == "sample":  # the virtual tokens are words
        weight = model.prompt_encoder["default"].embedding.weight
        words = whole.word_embeddings.weight
        assert (weight[:, None] == words[None]).all(-1).any(-1).all()
    whole.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
    how = {"input_ids": IDS, "max_new_tokens": 3}
    assert torch.equal(model.generate(**how), whole.generate(**how))


def test_tokens_are_not_lost_on_the_meta_device(tmp_path):
    """While the word embeddings have no data, virtual tokens that copy them have none either."""
    kept = prompt_model(peftkern, "sample")
    kept.save_pretrained(tmp_path)
    model = prompt_model(peftkern, "sample", base=make("llama").to("meta"))
    assert model.prompt_encoder["default"].embedding.weight.is_meta
    tokens = peftkern.get_peft_model_state_dict(kept)["prompt_embeddings"]
    model.prompt_encoder["default"].load_prompt_embeddings(tokens)
    model.load_adapter(str(tmp_path), "b", is_trainable=True)
    for name in ("default", "b"):
        weight = model.prompt_encoder[name].embedding.weight
        assert torch.equal(weight, kept.prompt_encoder["default"].embedding.weight)
    assert model.prompt_encoder["default"].embedding.weight.requires_grad


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_what_there_is_for_layers_only(kind):
    """Nothing can be merged or unloaded; HF PEFT's errors."""
    ours, theirs = prompt_pair(kind)
    for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"):
        for model in (ours, theirs):
            with pytest.raises(AttributeError, match=name):
                getattr(model, name)()
    for library in (peftkern, peft):
        config = getattr(library, type(ours.peft_config["default"]).__name__)(
            task_type="CAUSAL_LM", num_virtual_tokens=2
        )
        with pytest.raises(ValueError, match="prompt learning"):
            library.inject_adapter_in_model(config, make("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.get_prompt(2, task_ids=None, max_cache_len=9) is not None
    assert ours.transformer_backbone_name == theirs.transformer_backbone_name == "model"
    assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
    mine, wanted = (m.get_prompt_embedding_to_save("default") for m in (ours, theirs))
    assert_same_number(mine, wanted)
