"""The plain reference agrees with HF PEFT on prefixes and prompts, wherever HF PEFT is right."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import peft
import pytest
import torch

from tests import prefix_models, tiny
from tests.closeness import assert_same_number
from tests.plain_reference import greedy, peft_is_right, with_prompt
from tests.prefix_models import ENCODERS, NAMES, WITHOUT_HEADS, Pair, numbers
from tests.prompts import prompt_model

# of encoders only those that HF PEFT takes
PREFIXED = [(f, None) for f in NAMES if f not in ("distilbert", "modernbert", *WITHOUT_HEADS)]
PREFIXED += [("bert", "TOKEN_CLS"), ("llama", "SEQ_CLS"), ("gpt2", "TOKEN_CLS")]
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@pytest.mark.parametrize(("family", "task"), PREFIXED)
def test_prefix(family: str, task: str | None) -> None:
    pair = Pair(family, task)
    if not peft_is_right("prefix of a head" if pair.task in HEADS else "prefix"):
        pytest.skip("HF PEFT cannot")
    batch = prefix_models.inputs(family, "left", task)
    plain, theirs = (numbers(batch, oracle(**batch), weight) for oracle, weight in pair.oracles())
    assert_same_number(plain, theirs)
    if family in ENCODERS or task or not peft_is_right("prefix generate"):
        return
    del batch["labels"]
    tokens, logits = greedy(pair.base, pair.plain, batch, 4)
    how = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    out = pair.peft.generate(**batch, **how)
    assert torch.equal(tokens, out.sequences)
    assert_same_number(logits, torch.stack(out.logits).double())


@pytest.mark.parametrize("how", [{"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_prefix_in_other_ways_of_generation(family: str, how: dict[str, Any]) -> None:
    pair = Pair(family)
    if not peft_is_right("prefix generate"):
        pytest.skip("HF PEFT is wrong")
    batch = prefix_models.inputs(family, "left")
    del batch["labels"]
    out = []
    for generate in pair.generators():
        torch.manual_seed(0)
        out.append(generate(**batch, max_new_tokens=4, **how))
    assert torch.equal(*out)


@pytest.mark.parametrize("kind", ["prompt", "lstm"])
@pytest.mark.parametrize(("family", "task"), tiny.CASES)
def test_prompt(family: str, task: str, kind: str) -> None:
    if family == "t5" and task != "SEQ_2_SEQ_LM":
        pytest.skip("these models of transformers take no embeddings")
    base = tiny.make(family, task, torch.float64)
    theirs = prompt_model(peft, kind, base=base, task=task).double().eval()
    batch = tiny.inputs(family, task)
    if task == "TOKEN_CLS":  # HF PEFT leaves these shorter than the logits
        del batch["labels"]
    if family == "bert" and task in ("SEQ_CLS", "TOKEN_CLS"):  # elsewhere HF PEFT drops them
        batch["token_type_ids"] = batch["input_ids"] % 2
    prompt = theirs.get_prompt(1)[0, :5].detach().requires_grad_()
    own = theirs.base_model  # with the trained head
    mine, wanted = with_prompt(own, prompt, **batch), theirs(**batch)
    assert_same_number(tiny.first(mine), tiny.first(wanted))
    assert_same_number(tiny.loss_of(mine), tiny.loss_of(wanted))
    if kind == "prompt":
        tiny.loss_of(mine).backward()
        found = prompt.grad
        theirs.zero_grad()
        tiny.loss_of(wanted).backward()
        assert_same_number(found, theirs.prompt_encoder["default"].embedding.weight.grad[:5])
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return
    if family != "t5" and not peft_is_right("prompt generate"):
        return
    del batch["labels"]
    batch["input_ids"].clamp_(min=3)
    batch["attention_mask"].fill_(1)[0, :3] = 0
    run = partial(with_prompt, own, prompt.detach())
    tokens, logits = greedy(own, run, batch, 4)
    how = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # generate()'s own
        out = theirs.generate(**batch, **how)
    assert torch.equal(tokens, out.sequences)
    assert_same_number(logits, torch.stack(out.logits).double())


def test_it_says_no() -> None:
    """To a mask that is too long, and to positions that count the prefix twice."""
    pair = Pair("llama", peft_too=False)
    batch = prefix_models.inputs("llama", "left")
    right = pair.plain(**batch).logits
    where = torch.arange(9).expand(3, -1)
    assert_same_number(pair.plain(**batch, position_ids=where).logits, right)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_number(pair.plain(**batch, position_ids=where + prefix_models.P).logits, right)
