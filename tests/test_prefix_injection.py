"""Prefixes inside attention: HF PEFT's numbers for every family, without its cache of prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftkern.tuners.prefix_tuning import blocks, positions
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests.prefix_models import (
    CONFIGS,
    ENCODERS,
    HEADS,
    LAYERS,
    SEQ2SEQ,
    TAIL,
    VOCAB,
    WIDTH,
    WITHOUT_HEADS,
    P,
    Pair,
    assert_close,
    inputs,
    make,
    task_of,
)

# PEFT refuses encoders without past_key_values; stablelm stands in test_prefix_more_families; the
# others get one slow test each
NOT_HERE = ("distilbert", "modernbert", "stablelm", *WITHOUT_HEADS, *TAIL)
FAMILIES = [f for f in CONFIGS if f not in NOT_HERE]
BY_DISTANCE = ("t5", "mt5", "bloom", "falcon_alibi", "mpt")  # where no position is counted
CASES = [(f, None) for f in FAMILIES] + [
    ("bert", "TOKEN_CLS"),
    ("llama", "SEQ_CLS"),
    ("gpt2", "TOKEN_CLS"),
]


def real(batch: dict[str, Any], logits: Tensor) -> Tensor:
    """The logits of real tokens: those of padding are nobody's business."""
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() != 3 or logits.shape[1] != mask.shape[1]:
        return logits
    return logits[mask.bool()]


def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake of leaving own tokens where they would be without a prefix."""
    monkeypatch.setattr(positions, "move", lambda *_: None)
    monkeypatch.setattr(
        positions, "move_in_table", lambda table, args, kwargs, offset: (args, kwargs)
    )


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_matches_peft(
    family: str, task: str | None, padding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(family, task)
    batch = inputs(family, padding, task)
    if task == "SEQ_CLS" and family == "llama" and padding is None:
        batch = {k: v[:1] for k, v in batch.items()}  # its pooling needs a mask or a batch of 1
    with pair.active():
        ours = pair.model(**batch)
    theirs = pair.peft(**batch)
    expected = real(batch, theirs.logits)
    assert_close(real(batch, ours.logits), expected)
    assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    assert pair.peft_weight.grad.abs().max() > 1e-3
    assert_close(pair.weight.grad, pair.peft_weight.grad)

    # It could have failed: without the prefix, and with positions left alone, it is far off.
    with torch.no_grad():
        bare = real(batch, pair.base(**batch).logits)
        assert (bare - expected).abs().max() > 0.1
        if family not in BY_DISTANCE:
            unmoved(monkeypatch)
            with pair.active():
                wrong = real(batch, pair.model(**batch).logits)
            assert (wrong - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", TAIL)
def test_matches_peft_further_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that the table of families names shortly or not at all."""
    task = None if family in SEQ2SEQ else task_of(family)
    test_matches_peft(family, task, "left", monkeypatch)
    monkeypatch.undo()
    if family not in ENCODERS:
        test_generates_as_peft(family)


@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_prefix_has_its_distance(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where positions act by distance alone, the distance to the prefix counts."""
    pair = Pair(family)
    batch = inputs(family)
    expected = pair.peft(**batch).logits
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
    with torch.no_grad(), pair.active():
        wrong = pair.model(**batch).logits
    assert (real(batch, wrong) - real(batch, expected)).abs().max() > 0.01


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
def test_generates_as_peft(family: str) -> None:
    pair = Pair(family)
    batch = inputs(family, "left")
    del batch["labels"]
    seen = set()
    for how in ({}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}):
        out = []
        for model in (pair.model, pair.peft):
            torch.manual_seed(0)
            with pair.active():
                out.append(model.generate(**batch, max_new_tokens=6, **how))
        assert torch.equal(*out), how
        seen.add(tuple(out[0].flatten().tolist()))
    bare = pair.base.generate(**batch, max_new_tokens=6)
    assert len(seen) == 3 and tuple(bare.flatten().tolist()) not in seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart", "gemma3", "opt"])
def test_matches_peft_on_eager(family: str) -> None:
    """With another implementation underneath: the masks that other modules get are of its kind."""
    pair = Pair(family, implementation="eager")
    batch = inputs(family)
    with pair.active():
        ours = pair.model(**batch)
    theirs = pair.peft(**batch)
    assert_close(real(batch, ours.logits), real(batch, theirs.logits))
    with torch.no_grad():
        assert torch.equal(pair.model(**batch).logits, pair.base(**batch).logits)


def keys_of(model: Any, **call: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a call leaves in its cache, for each layer."""
    with torch.no_grad():
        cache = model(**call, use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
@pytest.mark.parametrize("length", [4, 14])
def test_keys_of_real_tokens_are_a_prefix(family: str, length: int) -> None:
    """No PEFT here: what the model computes behind real tokens is what it computes behind their
    keys as a prefix, a different one in each row, within a sliding window and beyond it."""
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
            assert_close(model(**call, **{name: ids[:, P:]}).logits, whole)
        with injection.active([(k.roll(1, 0), v.roll(1, 0)) for k, v in keys]):
            swapped = model(**call, **{name: ids[:, P:]}).logits
    assert (swapped - whole).abs().max() > 0.01


@pytest.mark.parametrize("family", [*ENCODERS, "modernbert", *WITHOUT_HEADS])
@pytest.mark.parametrize("length", [4, 14])
def test_keys_in_an_encoder_are_a_prefix(
    family: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for encoders, PEFT's and some that it refuses: the keys that the first tokens have
    in a run over all of them, in front of a run over the rest."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, P + length), generator=g)
    base = make(family).base_model
    keys: list[tuple[Tensor, Tensor]] = []
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
        keys.append((key[:, :, :P], value[:, :, :P]))
        return run(module, query, key, value, *a, **k)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
        whole = base(ids).last_hidden_state[:, P:]
    assert len(keys) == LAYERS
    model = make(family).base_model
    injection = PrefixInjection(
        model, num_layers=LAYERS, kv_heads=HEADS, head_dim=WIDTH // HEADS, num_virtual_tokens=P
    )
    with torch.no_grad():
        with injection.active(keys):
            assert_close(model(ids[:, P:]).last_hidden_state, whole)
            padded = torch.nn.functional.pad(ids[:, P:], (0, 2), value=0)
            mask = padded.ne(0).long()
            assert_close(model(padded, attention_mask=mask).last_hidden_state[:, :-2], whole)
        assert (model(ids[:, P:]).last_hidden_state - whole).abs().max() > 0.1
