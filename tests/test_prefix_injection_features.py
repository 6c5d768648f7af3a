"""A prefix in the attention: training, and any masks and positions that a caller gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkern.tuners.prefix_tuning import attention
from peftkern.utils.versions import checkpoints_without_gradients
from tests.closeness import assert_same_number, differ
from tests.models import LAYERS, SEQ2SEQ, VOCAB
from tests.needs import needs
from tests.plain_reference import CACHE
from tests.prefix_models import HEADS, IN_BLOCKS, P, Pair, alone, inputs
from tests.tiny import loss_of

VARIED = ["llama", "gpt2", "bert", "t5", "bart", "mistral", "gemma2", "gpt_oss", "opt", "roberta"]


# ------------------------------------------------------------------------------------- training


def gradients(pair: Pair, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Two forwards with different prefixes, then the backward of both: losses and gradients."""
    weight = pair.weight
    losses = []
    for factor in (1.0, 0.5):
        with pair.injection.active(pair.prefixes(weight * factor)):
            losses.append(loss_of(pair.model(**batch)))
    (losses[0] - 3 * losses[1]).backward()
    grad, weight.grad = weight.grad, None
    return torch.stack(losses).detach(), grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [*VARIED, *IN_BLOCKS])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """Equal gradients, whatever another forward did in between; ``weight * factor`` is no leaf."""
    pair = alone(family)
    pair.model.requires_grad_(False).train()
    batch = inputs(family)
    losses, expected = gradients(pair, batch)
    pair.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    run = attention._with_prefix
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_with_prefix", lambda *a, **k: (calls.append(1), run(*a, **k))[1])
        again, found = gradients(pair, batch)
    assert family in IN_BLOCKS or len(calls) == 4 * LAYERS, "the layers were not run again"
    assert expected.any()
    assert_same_number((again, found), (losses, expected))


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_checkpointing_beside_a_cache(family: str) -> None:
    """A replay must not write to a caller's cache again: as in transformers, none is used."""
    pair = alone(family)
    pair.model.requires_grad_(False).train()
    pair.model.gradient_checkpointing_enable()
    batch = inputs(family)
    _, expected = gradients(pair, batch)
    cache = tf.DynamicCache(config=pair.model.config)
    _, found = gradients(pair, {**batch, CACHE: cache})
    assert cache.get_seq_length() == 0
    assert_same_number(found, expected)
    pair.model(**batch, **{CACHE: cache}).loss.backward()  # nor where there is no prefix
    assert cache.get_seq_length() == 0
    with torch.no_grad():  # nothing is replayed, and since transformers 5.24 the cache is used
        pair.model(**batch, **{CACHE: cache})
    unused = checkpoints_without_gradients()
    assert cache.get_seq_length() == (0 if unused else batch["input_ids"].shape[1])


@pytest.mark.parametrize("family", ["bart", "opt"])
def test_layers_dropped_in_training_are_not_missed(family: str) -> None:
    pair = alone(family)
    pair.injection.stack.layerdrop = 0.5
    batch = inputs(family)
    with torch.no_grad(), pair.active():
        pair.model.train()
        torch.manual_seed(0)
        losses = {float(pair.model(**batch).loss) for _ in range(8)}
    assert len(losses) > 1
    for module in pair.injection.attentions:  # called, and without their prefix
        delattr(module, attention.SLOT)
    with torch.no_grad(), pair.active(), pytest.raises(RuntimeError, match="did not hand the pre"):
        for _ in range(8):
            pair.model(**batch)


def test_a_reentrant_checkpoint_of_somebody_else() -> None:
    """The prefix would silently not train."""
    pair = alone("llama")
    layer = pair.injection.layers[1]
    inner = layer.forward
    layer.forward = lambda x, **rest: checkpoint(partial(inner, **rest), x, use_reentrant=True)
    prefixes: Any = [tuple(x.detach().requires_grad_() for x in both) for both in pair.prefixes()]
    torchs_own = pytest.warns(UserWarning, match="None of the inputs have requires_grad")
    with torchs_own, pair.injection.active(prefixes):
        with pytest.raises(RuntimeError, match="layer 1 runs without gradients"):
            pair.model(**inputs("llama"))
        with torch.no_grad():
            pair.model(**inputs("llama"))


def test_a_second_backward_through_reentrant_checkpoints() -> None:
    pair = alone("llama")
    pair.model.requires_grad_(False).train()
    pair.model.gradient_checkpointing_enable({"use_reentrant": True})
    batch = inputs("llama")
    with pair.active():
        loss = pair.model(**batch).loss
    loss.backward(retain_graph=True)
    once = pair.weight.grad.clone()
    loss.backward()
    assert_same_number(pair.weight.grad, 2 * once)


@pytest.mark.parametrize(
    "family", ["llama", "bert", "gpt2", "t5", "opt", "gpt_neox", "bloom", "gptj", "mpt"]
)
def test_attention_dropout(family: str) -> None:
    """From the same generator the same weights are dropped, the prefix's among them."""
    pair = Pair(family)
    batch = inputs(family)
    with pair.active():
        still = pair.model(**batch).loss
    for model in (pair.model, pair.base, pair.peft):
        for name, module in model.named_modules():
            if "attn" not in name and "attention" not in name.lower():
                continue
            for dropped in ("attention_dropout", "dropout", "dropout_prob", "attn_dropout_p"):
                if isinstance(getattr(module, dropped, None), float):
                    setattr(module, dropped, 0.3)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        model.train()
    losses = []
    for model in (pair.model, *(oracle for oracle, _ in pair.oracles())):
        torch.manual_seed(5)
        with pair.active():
            losses.append(loss_of(model(**batch)))
    for expected in losses[1:]:
        assert_same_number(losses[0], expected)
    pair.model.eval()
    with pair.active():
        assert torch.equal(pair.model(**batch).loss, still)
    assert differ(still.double(), losses[0])


# ----------------------------------------------------------------------- masks and positions


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma3"])
def test_output_attentions(family: str, implementation: str) -> None:
    if family == "t5" and implementation == "sdpa":
        needs("transformers>=5.23", "T5's decoder does not take another implementation later")
    pair = Pair(family, implementation=implementation)
    batch = inputs(family)
    name = "decoder_attentions" if family in SEQ2SEQ else "attentions"
    with pair.active():
        ours = getattr(pair.model(**batch, output_attentions=True), name)
    T = batch["labels" if family in SEQ2SEQ else "input_ids"].shape[1]
    assert len(ours) == LAYERS and all(a.shape == (3, HEADS, T, P + T) for a in ours)
    row = [a[:1] for a in ours]  # the first has no padding
    for model in (pair.base, pair.peft):  # sdpa gives none
        model.set_attn_implementation("eager")
    for oracle, _ in pair.oracles():
        expected = getattr(oracle(**batch, output_attentions=True), name)
        assert_same_number(row, [a[:1] for a in expected])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_packed_documents(family: str) -> None:
    """Two documents in one row, told apart by their positions: each sees the prefix and itself."""
    pair = alone(family)
    g = torch.Generator().manual_seed(6)
    first, second = (torch.randint(3, VOCAB, (1, n), generator=g) for n in (12, 5))
    where = torch.cat([torch.arange(12), torch.arange(5)])[None]
    row = torch.cat([first, second], dim=1)
    with torch.no_grad(), pair.active():
        apart = torch.cat([pair.model(ids).logits for ids in (first, second)], dim=1)
        packed = pair.model(row, position_ids=where, use_cache=False).logits
        joined = pair.model(row, use_cache=False).logits
    assert_same_number(packed, apart)
    assert differ(joined, apart)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bloom", "falcon"])
def test_masks_of_four_dimensions(family: str) -> None:
    """A caller's own [B, 1, T, T] mask is over its tokens; the prefix stays visible."""
    pair = alone(family)
    batch = inputs(family)
    batch.pop("labels")
    T = batch["input_ids"].shape[1]
    keep = batch["attention_mask"].bool()
    visible = keep[:, None, None, :].expand(-1, 1, T, -1)
    if family != "bert":
        visible = visible & torch.ones(T, T).tril().bool()
    added = torch.zeros(visible.shape, dtype=torch.float64)
    added.masked_fill_(~visible, torch.finfo(torch.float32).min)
    kinds = [added] if family in ("bloom", "falcon") else [visible, added]
    if family == "bloom":
        with pair.active(), pytest.raises(Exception, match="unpack|dimension"):
            pair.model(batch["input_ids"], attention_mask=added)  # stock counts over two
        return
    with torch.no_grad(), pair.active():
        expected = pair.model(**batch).logits
        for mask in kinds:
            where = torch.arange(T)[None]
            got = pair.model(batch["input_ids"], attention_mask=mask, position_ids=where).logits
            if family == "bert":
                assert_same_number(got, expected)
            else:
                assert_same_number(got[keep], expected[keep])
    if family in ("llama", "gpt2", "bert"):
        wide = torch.nn.functional.pad(visible, (P, 0), value=True)
        with pair.active(), pytest.raises(ValueError, match="without the virtual"):
            pair.model(batch["input_ids"], attention_mask=wide)


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "bloom", "gptj", "t5"])
def test_mask_over_the_prefix_is_refused(family: str) -> None:
    pair = alone(family)
    batch = inputs(family)
    name = "attention_mask"
    if family in SEQ2SEQ:
        name = "decoder_attention_mask"
        batch[name] = torch.ones_like(batch["labels"])
    batch[name] = torch.nn.functional.pad(batch[name], (P, 0), value=1)
    with pair.active(), pytest.raises(ValueError, match="attention_mask covers"):
        pair.model(**batch)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "bert", "roberta", "bart", "gpt_neo", "gptj", "mpt", "distilbert"]
)
def test_no_room_for_the_prefix(family: str) -> None:
    pair = alone(family)
    room = 64 - (1 if family == "roberta" else 0)
    ids = torch.full((1, room - P + 1), 5)
    call = {"input_ids": ids}
    if family in SEQ2SEQ:
        call = {"input_ids": ids[:, :4], "decoder_input_ids": ids}
    with torch.no_grad(), pair.active():
        with pytest.raises(ValueError, match=rf"{P} virtual tokens and {room - P + 1} tokens"):
            pair.model(**call)
        name = "decoder_input_ids" if family in SEQ2SEQ else "input_ids"
        pair.model(**{**call, name: ids[:, :-1]})
    with torch.no_grad():
        pair.model(**call)  # without a prefix there is room


def test_an_unknown_keyword_is_refused() -> None:
    pair = alone("llama")
    with pair.active():
        with pytest.raises(ValueError, match="LlamaAttention hands head_mask"):
            pair.model(**inputs("llama"), head_mask=torch.ones(HEADS))
        lengths = torch.tensor([0, 5, 9], dtype=torch.int32)
        ids = torch.full((1, 9), 5)
        with pytest.raises(ValueError, match="position_ids"):
            pair.model(ids, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, use_cache=False)
        where = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
        packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "position_ids": where}
        pair.model(ids, **packed, use_cache=False)
