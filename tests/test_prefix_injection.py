"""A prefix inside attention gives the numbers of keys and values in a cache, in every family."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftkern.tuners.prefix_tuning import blocks, positions
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.models import LAYERS, SEQ2SEQ, VOCAB
from tests.plain_reference import CACHE, greedy
from tests.prefix_models import (
    ENCODERS,
    HEADS,
    NAMES,
    TAIL,
    WIDTH,
    WITHOUT_HEADS,
    P,
    Pair,
    inputs,
    make,
    numbers,
    real,
    task_of,
)

# PEFT refuses encoders without past_key_values; stablelm stands in test_prefix_more_families; the
# others get one slow test each
NOT_HERE = ("distilbert", "modernbert", "stablelm", *WITHOUT_HEADS, *TAIL)
FAMILIES = [f for f in NAMES if f not in NOT_HERE]
BY_DISTANCE = ("t5", "mt5", "bloom", "falcon_alibi", "mpt")  # where no position is counted
CASES = [(f, None) for f in FAMILIES] + [
    ("bert", "TOKEN_CLS"),
    ("llama", "SEQ_CLS"),
    ("gpt2", "TOKEN_CLS"),
]


def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake of leaving own tokens where they would be without a prefix."""
    monkeypatch.setattr(positions, "move", lambda *_: None)
    monkeypatch.setattr(
        positions, "move_in_table", lambda table, args, kwargs, offset: (args, kwargs)
    )


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_matches_the_oracles(
    family: str, task: str | None, padding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain reference's numbers and HF PEFT's."""
    pair = Pair(family, task)
    batch = inputs(family, padding, task)
    if task == "SEQ_CLS" and family == "llama" and padding is None:
        batch = {k: v[:1] for k, v in batch.items()}  # its pooling needs a mask or a batch of 1
    with pair.active():
        ours = numbers(batch, pair.model(**batch), pair.weight)
    for oracle, weight in pair.oracles():
        assert_same_number(ours, numbers(batch, oracle(**batch), weight))
    assert ours["gradient"].any()

    # It could have failed: without the prefix, and with positions left alone, it is far off.
    with torch.no_grad():
        assert differ(real(batch, pair.base(**batch).logits), ours["logits"])
        if family not in BY_DISTANCE:
            unmoved(monkeypatch)
            with pair.active():
                assert differ(real(batch, pair.model(**batch).logits), ours["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mistral", "bloom"])
def test_is_as_exact_as_the_oracles(family: str, dtype: torch.dtype) -> None:
    """In fp32 and bf16: no further from float64 than keys and values in a cache are."""
    task = "TOKEN_CLS" if family == "bert" else None
    pair, batch = Pair(family, task, dtype=dtype), inputs(family, "left", task)
    # long enough that bf16 is computed in blocks
    batch = {k: v.repeat(1, 3) if v.dim() == 2 else v for k, v in batch.items()}
    with pair.active():
        ours = numbers(batch, pair.model(**batch), pair.weight)
    theirs = [numbers(batch, oracle(**batch), weight) for oracle, weight in pair.oracles()]
    pair.base.double()
    pair.weight = pair.weight.detach().double().requires_grad_()
    exact = numbers(batch, pair.plain(**batch), pair.weight)
    assert_as_good_as_torch(ours, theirs, exact, average=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", TAIL)
def test_matches_the_oracles_further_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that the table of families names shortly or not at all."""
    task = None if family in SEQ2SEQ else task_of(family)
    test_matches_the_oracles(family, task, "left", monkeypatch)
    monkeypatch.undo()
    if family not in ENCODERS:
        test_generates_as_the_oracles(family)


@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_prefix_has_its_distance(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In models with distances only, the distance to the prefix has an effect."""
    pair = Pair(family, peft_too=False)
    batch = inputs(family)
    if family == "bloom":
        monkeypatch.setattr(
            blocks, "_bloom", lambda a, *_: torch.nn.functional.pad(a, (P, 0), value=0.0)
        )
    else:
        layer = pair.injection.attentions[0]
        right = layer.compute_bias

        def near(T: int, S: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
            moved = past_seen_tokens - P if S == P else past_seen_tokens
            return right(T, S, device=device, past_seen_tokens=moved)

        monkeypatch.setattr(layer, "compute_bias", near)
    with torch.no_grad():
        with pair.active():
            wrong = pair.model(**batch).logits
        assert differ(real(batch, wrong), real(batch, pair.plain(**batch).logits))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
def test_generates_as_the_oracles(family: str) -> None:
    """Greedily, by sampling and by beams; the plain reference computes all anew for each token."""
    pair = Pair(family)
    batch = inputs(family, "left")
    del batch["labels"]
    seen = set()
    for how in ({}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}):
        out = []
        for generate in (pair.model.generate, *pair.generators()):
            torch.manual_seed(0)
            with pair.active():
                out.append(generate(**batch, max_new_tokens=6, **how))
        assert all(torch.equal(out[0], other) for other in out[1:]), how
        if not how:
            assert torch.equal(out[0], greedy(pair.base, pair.plain, batch, 6)[0])
        seen.add(tuple(out[0].flatten().tolist()))
    bare = pair.base.generate(**batch, max_new_tokens=6)
    assert len(seen) == 3 and tuple(bare.flatten().tolist()) not in seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart", "gemma3", "opt"])
def test_matches_the_oracles_on_eager(family: str) -> None:
    """With another implementation underneath: the masks that other modules get are of its kind."""
    pair = Pair(family, implementation="eager")
    batch = inputs(family)
    with torch.no_grad():
        with pair.active():
            ours = real(batch, pair.model(**batch).logits)
        assert torch.equal(pair.model(**batch).logits, pair.base(**batch).logits)
        for oracle, _ in pair.oracles():
            assert_same_number(ours, real(batch, oracle(**batch).logits))


def keys_of(model: Any, **call: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a call leaves in its cache, for each layer."""
    with torch.no_grad():
        cache = getattr(model(**call, use_cache=True), CACHE)
    cache = getattr(cache, "self_attention_cache", cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
@pytest.mark.parametrize("length", [4, 14])
def test_keys_of_real_tokens_are_a_prefix(family: str, length: int) -> None:
    """Without PEFT: keys of real tokens as a prefix give the results behind these tokens.

    Each row has another prefix, and the tokens are within a sliding window or beyond it.
    """
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, P + length), generator=g)
    base = make(family)
    call, name = {}, "input_ids"
    if family in SEQ2SEQ:
        call["input_ids"] = torch.randint(3, VOCAB, (3, 7), generator=g)
        name = "decoder_input_ids"
    with torch.no_grad():
        whole = base(**call, **{name: ids}).logits[:, P:]
    keys = keys_of(base, **call, **{name: ids[:, :P]})
    _, heads, _, head_dim = keys[0][0].shape
    model = make(family)
    injection = PrefixInjection(
        model, num_layers=LAYERS, kv_heads=heads, head_dim=head_dim, num_virtual_tokens=P
    )
    with torch.no_grad():
        with injection.active(keys):
            assert_same_number(model(**call, **{name: ids[:, P:]}).logits, whole)
        with injection.active([(k.roll(1, 0), v.roll(1, 0)) for k, v in keys]):
            swapped = model(**call, **{name: ids[:, P:]}).logits
    assert differ(swapped, whole)


@pytest.mark.parametrize("family", [*ENCODERS, "modernbert", *WITHOUT_HEADS])
@pytest.mark.parametrize("length", [4, 14])
def test_keys_in_an_encoder_are_a_prefix(
    family: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in encoders, those that PEFT supports and some that it refuses.

    The prefix is the keys of the first tokens in a run over all of them, and is put before a run
    over the rest.
    """
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, P + length), generator=g)
    base = make(family).base_model
    keys: list[tuple[Tensor, Tensor]] = []
    name = base.config._attn_implementation
    run = ALL_ATTENTION_FUNCTIONS.get(name)
    run = run or sys.modules[type(base).__module__].eager_attention_forward

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
        keys.append((key[:, :, :P], value[:, :, :P]))
        return run(module, query, key, value, *a, **k)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, name, record)
        whole = base(ids).last_hidden_state[:, P:]
    assert len(keys) == LAYERS
    model = make(family).base_model
    injection = PrefixInjection(
        model, num_layers=LAYERS, kv_heads=HEADS, head_dim=WIDTH // HEADS, num_virtual_tokens=P
    )
    with torch.no_grad():
        with injection.active(keys):
            assert_same_number(model(ids[:, P:]).last_hidden_state, whole)
            padded = torch.nn.functional.pad(ids[:, P:], (0, 2), value=0)
            mask = padded.ne(0).long()
            longer = model(padded, attention_mask=mask).last_hidden_state
            assert_same_number(longer[:, :-2], whole)
        assert differ(model(ids[:, P:]).last_hidden_state, whole)
