"""Families that change their keys before attention, or use no mask, take a prefix in attention.

The numbers are HF PEFT's.
"""

from __future__ import annotations

import pytest
import torch

import peftkern
from tests.closeness import assert_same_number, differ
from tests.prefix_zoo import (
    batch_of,
    checkpoints,
    generated,
    gradient,
    make,
    oracle,
    real,
    task_of,
    tuned,
    weight_of,
)
from tests.tiny import first, loss_of

INJECTED = [
    "doge",
    "doge window",
    "diffllama",
    "megatron-bert",
    "megatron-bert decoder",
    "rembert",
    "rembert decoder",
    "eurobert",
]
DECODERS = [family for family in INJECTED if task_of(family) == "CAUSAL_LM"]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", INJECTED)
def test_is_hf_pefts(family: str, padding: str | None) -> None:
    ours, batch = tuned(peftkern, family), batch_of(family, padding)
    mine, grad = gradient(ours, batch)
    wanted, expected = gradient(ours, batch, oracle(ours, family))
    assert_same_number(real(batch, first(mine)), real(batch, first(wanted)))
    assert_same_number(loss_of(mine).double(), loss_of(wanted).double())  # transformers: in fp32
    assert_same_number(grad, expected)
    with torch.no_grad(), ours.disable_adapter():
        plain = first(ours(**batch))
    assert differ(real(batch, plain), real(batch, first(wanted)))
    assert all("compared" not in row.reason for row in peftkern.explain(ours))


@pytest.mark.parametrize("family", DECODERS)
def test_generation(family: str) -> None:
    ours, batch = tuned(peftkern, family), batch_of(family, "left")
    del batch["labels"]
    ids, base = batch["input_ids"], make(family)
    with torch.no_grad():  # on transformers 5.17, decoders of BERT's kin see what is behind
        causal = not differ(base(ids[:, :5]).logits, base(ids).logits[:, :5])
    for how in ({}, {"num_beams": 3}):
        how = {"max_new_tokens": 6, "do_sample": False, **how}
        tokens = ours.generate(**batch, **how)
        assert torch.equal(tokens, generated(ours, family, batch, **how))
        if causal:
            assert torch.equal(tokens, ours.generate(**batch, **how, use_cache=False))


@pytest.mark.parametrize("family", ["doge window", "diffllama", "rembert"])
def test_what_injection_gives(family: str) -> None:
    """Gradient checkpointing, and rows with a prefix of their own or none."""
    model = tuned(peftkern, family)
    batch = batch_of(family, None)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    _, expected = gradient(model, batch)
    checkpoints(model, "enable", {"use_reentrant": False})
    _, grad = gradient(model, batch)
    assert_same_number(grad, expected)

    checkpoints(model, "disable")
    model.eval()
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        weight_of(model, "other").normal_(generator=torch.Generator().manual_seed(2))
        mixed = model(**batch, adapter_names=["other", "__base__", "default"]).logits
        assert_same_number(mixed[2], model(**batch).logits[2])
        model.set_adapter("other")
        assert_same_number(mixed[0], model(**batch).logits[0])
        with model.disable_adapter():
            assert_same_number(mixed[1], model(**batch).logits[1])
