"""What PEFT's prefix in the cache cannot do, or does wrongly, and a prefix in the attention can."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from peftkern.tuners.prefix_tuning import attention
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests.prefix_models import (
    HEADS,
    LAYERS,
    SEQ2SEQ,
    VOCAB,
    WIDTH,
    P,
    Pair,
    inputs,
    make,
    split,
    task_of,
)

VARIED = ["llama", "gpt2", "bert", "t5", "bart", "mistral", "gemma2", "gpt_oss", "opt", "roberta"]
IN_BLOCKS = ["bloom", "gptj", "gpt_neo", "codegen", "falcon", "falcon_mqa", "falcon_alibi", "mpt"]


def alone(family: str, **more: Any) -> Pair:
    """A pair without its PEFT half."""
    return Pair(family, peft_too=False, **more)


def sizes(pair: Pair) -> dict[str, int]:
    injection = pair.injection
    return {
        "num_layers": pair.layers,
        "kv_heads": injection.kv_heads,
        "head_dim": injection.head_dim,
        "num_virtual_tokens": injection.num_virtual_tokens,
    }


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    scale = max(1e-3, float(b.detach().abs().max()))
    assert float((a - b).detach().abs().max()) <= tolerance * scale


# ------------------------------------------------------------------------------------- training


def gradients(pair: Pair, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Two forwards with different prefixes, then the backward of both: losses and gradients."""
    weight = pair.weight
    losses = []
    for factor in (1.0, 0.5):
        with pair.injection.active(pair.prefixes(weight * factor)):
            losses.append(pair.model(**batch).loss)
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
    assert expected.abs().max() > 1e-3
    assert_close(again, losses, 1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_attention_dropout(family: str) -> None:
    pair = Pair(family)
    batch = inputs(family)
    losses = []
    for model in (pair.model, pair.peft):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
            if type(module).__name__ in ("BertSelfAttention", "GPT2Attention"):
                inner = "dropout" if family == "bert" else "attn_dropout"
                setattr(module, inner, torch.nn.Dropout(0.3))
        model.train()
        torch.manual_seed(5)
        with pair.active():
            losses.append(model(**batch).loss)
    assert_close(*losses)
    pair.model.eval()
    with pair.active():
        assert abs(pair.model(**batch).loss - losses[0]) > 1e-3


# ----------------------------------------------------------------------- masks and positions


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma3"])
def test_output_attentions(family: str, implementation: str) -> None:
    pair = Pair(family, implementation=implementation)
    batch = inputs(family)
    theirs = Pair(family, implementation="eager").peft
    name = "decoder_attentions" if family in SEQ2SEQ else "attentions"
    with pair.active():
        ours = getattr(pair.model(**batch, output_attentions=True), name)
    expected = getattr(theirs(**batch, output_attentions=True), name)
    T = batch["labels" if family in SEQ2SEQ else "input_ids"].shape[1]
    assert len(ours) == LAYERS
    real = slice(0, 1)  # the first row has no padding
    for mine, wanted in zip(ours, expected, strict=True):
        assert mine.shape == (3, HEADS, T, P + T)
        assert_close(mine[real], wanted[real])


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
    assert_close(packed, apart)
    assert (joined - apart).abs().max() > 0.01


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
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
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
                assert_close(got, expected)
            else:
                assert_close(got[keep], expected[keep])
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


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "t5", "bart", "opt", *IN_BLOCKS])
def test_generation_without_a_cache(family: str) -> None:
    pair = alone(family) if family != "falcon_mqa" else Pair(family)
    batch = inputs(family, "left")
    del batch["labels"]
    with pair.active():
        cached = pair.model.generate(**batch, max_new_tokens=6)
        assert torch.equal(pair.model.generate(**batch, max_new_tokens=6, use_cache=False), cached)


STATIC = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "t5", "bart", "gptj", "falcon"]


@pytest.mark.parametrize("family", STATIC)
def test_static_cache(family: str) -> None:
    pair = alone(family)
    batch = inputs(family, "left")
    del batch["labels"]
    with pair.active():
        dynamic = pair.model.generate(**batch, max_new_tokens=8)
        static = pair.model.generate(**batch, max_new_tokens=8, cache_implementation="static")
    assert torch.equal(static, dynamic)
    assert not torch.equal(pair.base.generate(**batch, max_new_tokens=8), dynamic)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt", *IN_BLOCKS])
def test_a_callers_own_cache(family: str) -> None:
    """Continued from it, and it holds the tokens alone."""
    pair = Pair(family)
    ids = inputs(family, None)["input_ids"]
    with torch.no_grad(), pair.active():
        whole = pair.model(ids).logits
        cache = tf.DynamicCache(config=pair.model.config)
        parts = [pair.model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 9))]
    assert cache.get_seq_length() == 9
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("family", ["llama", "bart", "t5", "bert", "bloom", "falcon_alibi", "opt"])
def test_rows_without_a_prefix(family: str) -> None:
    """They are what the model alone makes of them, positions included; the others are not."""
    pair = alone(family)
    batch = inputs(family)
    rows = torch.tensor([True, False, True])
    with torch.no_grad():
        with pair.active():
            full = pair.model(**batch).logits
        with pair.active(no_prefix=rows):
            mixed = pair.model(**batch).logits
        bare = pair.base(**batch).logits
    seen = batch["attention_mask"].bool() if mixed.shape[:2] == (3, 9) else None
    for row in range(3):
        wanted = bare if rows[row] else full
        a, b = mixed[row], wanted[row]
        if seen is not None:
            a, b = a[seen[row]], b[seen[row]]
        assert_close(a, b)
    assert (bare - full).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "bloom"])
def test_a_prefix_for_each_row_with_beams(family: str) -> None:
    pair = alone(family)
    batch = inputs(family, "left")
    del batch["labels"]
    weights = [pair.weight.detach() * s for s in (1.0, -1.0, 0.5)]
    rows = [split(w, pair.heads, pair.layers, pair.seq2seq) for w in weights]
    each = [
        tuple(torch.stack([rows[b][layer][i] for b in range(3)]) for i in (0, 1))
        for layer in range(pair.layers)
    ]
    none = torch.tensor([False, False, True])
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    with pair.injection.active(each, no_prefix=none):
        together = pair.model.generate(**batch, **how)
    for b in range(3):
        one = {k: v[b : b + 1] for k, v in batch.items()}
        with pair.injection.active(rows[b], no_prefix=none[b : b + 1]):
            assert torch.equal(pair.model.generate(**one, **how), together[2 * b : 2 * b + 2])
    with pair.injection.active(each), pytest.raises(ValueError, match="for 3 rows"):
        pair.model(**{k: v[:2] for k, v in inputs(family).items()})


# ------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mistral", "bloom"])
def test_compiled_forward_and_backward(family: str) -> None:
    torch._dynamo.reset()
    pair = alone(family)
    pair.model.requires_grad_(False)
    batch = inputs(family)
    with pair.active():
        eager = pair.model(**batch)
    (expected,) = torch.autograd.grad(eager.loss, pair.weight)
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    with pair.active():
        out = compiled(**batch)
    assert_close(out.logits, eager.logits)
    assert_close(torch.autograd.grad(out.loss, pair.weight)[0], expected)
    # another prefix is another input, not a constant of the graph
    with torch.no_grad(), pair.injection.active(pair.prefixes(pair.weight * -1)):
        assert_close(compiled(**batch).logits, pair.model(**batch).logits)
    with torch.no_grad():
        assert_close(compiled(**batch).logits, pair.base(**batch).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj"])
def test_compiled_static_decode(family: str) -> None:
    torch._dynamo.reset()
    pair = alone(family)
    ids = inputs(family, None)["input_ids"]
    step = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(pair.model, backend=counter)
    del counted
    with torch.no_grad(), pair.active():
        expected = pair.model(ids).logits
        cache = tf.StaticCache(config=pair.model.config, max_cache_len=16)
        pair.model(ids[:, :4], past_key_values=cache)
        for t in range(4, 9):
            where = torch.full((3, 1), t)
            got = step(ids[:, t : t + 1], past_key_values=cache, position_ids=where).logits
            assert_close(got[:, 0], expected[:, t])


# -------------------------------------------------------------------- around it: safe and clean


def test_threads_do_not_see_each_other() -> None:
    pair = alone("llama")
    batch = inputs("llama")
    weights = [pair.weight.detach() * s for s in (1.0, -1.0, 0.3)]
    with torch.no_grad():
        expected = [pair.base(**batch).logits]
        for w in weights:
            with pair.injection.active(pair.prefixes(w)):
                expected.append(pair.model(**batch).logits)
    wrong: list[int] = []
    gate = threading.Barrier(4)

    def work(i: int) -> None:
        gate.wait()
        for _ in range(15):
            with torch.no_grad():
                if i == 0:
                    got = pair.model(**batch).logits
                else:
                    with pair.injection.active(pair.prefixes(weights[i - 1])):
                        got = pair.model(**batch).logits
            if not torch.allclose(got, expected[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert (expected[1] - expected[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_a_model_that_swallows_the_prefix(family: str) -> None:
    pair = alone("stablelm") if family == "stablelm" else None
    if pair is None:
        config = tf.NemotronConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
        )
        model = tf.AutoModelForCausalLM.from_config(config)
        try:
            injection = PrefixInjection(
                model, num_layers=2, kv_heads=2, head_dim=8, num_virtual_tokens=P
            )
        except ValueError as error:
            assert "NemotronForCausalLM" in str(error)
            return
        prefixes = [(torch.randn(2, P, 8), torch.randn(2, P, 8))] * 2
    else:
        model, injection, prefixes = pair.model, pair.injection, pair.prefixes()
    ids = torch.full((1, 5), 7)
    model(ids)
    with injection.active(prefixes), pytest.raises(RuntimeError, match=type(model).__name__):
        model(ids)


def test_a_later_choice_of_implementation() -> None:
    """It becomes the one that stands behind; the prefix is not lost."""
    pair = Pair("llama")
    batch = inputs("llama")
    pair.model.set_attn_implementation("eager")
    with pair.active():
        ours = pair.model(**batch, output_attentions=True)
    assert_close(ours.logits, pair.peft(**batch).logits)
    assert attention.original_of(pair.model.config._attn_implementation) == "eager"
    pair.injection.remove()
    assert pair.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "bart", "t5", "bloom", "gpt2"])
def test_without_a_prefix_and_after_removal(family: str) -> None:
    pair = alone(family)
    model, batch = pair.model, inputs(family)
    fresh = make(family)

    def traces(m: Any) -> list[Any]:
        found: list[Any] = []
        for name, module in m.named_modules():
            hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
            marks = [k for k in module.__dict__ if "peftkern" in k or "checkpoint_with" in k]
            config = getattr(module, "config", None)
            found.append((name, hooks, marks, getattr(config, "_attn_implementation", None)))
        return found

    assert traces(model) != traces(fresh)
    with torch.no_grad():
        expected = pair.base(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        with pair.active():
            assert not torch.equal(model(**batch).logits, expected)
        pair.injection.remove()
        assert torch.equal(model(**batch).logits, expected)
    assert traces(model) == traces(fresh)
    assert model.config.to_dict() == fresh.config.to_dict()
    with pytest.raises(RuntimeError, match="removed"), pair.active():
        pass
    PrefixInjection(model, **sizes(pair))  # there is room for another now


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["llama", "bloom", "bart"])
def test_copies_stand_alone(family: str, how: str) -> None:
    pair = alone(family)
    batch = inputs(family)
    both = {"model": pair.model, "injection": pair.injection}
    twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    with torch.no_grad():
        with pair.active():
            expected = pair.model(**batch).logits
            assert torch.equal(twin["model"](**batch).logits, pair.base(**batch).logits)
        with twin["injection"].active(pair.prefixes()):
            assert torch.equal(twin["model"](**batch).logits, expected)
            assert torch.equal(pair.model(**batch).logits, pair.base(**batch).logits)
        twin["injection"].remove()
        assert torch.equal(twin["model"](**batch).logits, pair.base(**batch).logits)
        with pair.active():
            assert torch.equal(pair.model(**batch).logits, expected)


def test_an_error_inside_leaves_nothing_behind() -> None:
    pair = alone("llama")
    with pytest.raises(ValueError), pair.active():
        pair.model(**inputs("llama"), head_mask=torch.ones(1))
    batch = inputs("llama")
    with torch.no_grad():
        assert torch.equal(pair.model(**batch).logits, pair.base(**batch).logits)


def test_layers_without_a_prefix() -> None:
    pair = alone("llama")
    batch = inputs("llama")
    prefixes = pair.prefixes()
    with torch.no_grad():
        with pair.injection.active([None, None]):
            # positions still stand behind: relative ones, so it is the model alone
            assert_close(pair.model(**batch).logits, pair.base(**batch).logits)
        with pair.injection.active([prefixes[0], None]):
            half = pair.model(**batch).logits
        with pair.active():
            assert not torch.allclose(half, pair.model(**batch).logits, atol=1e-2)


def test_the_operation_gets_no_mask_and_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding: no mask of any kind, one prefix for all rows, keys not repeated."""
    pair = alone("llama")
    seen = []
    run = attention.prefix_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, **more: Any) -> Any:
        seen.append((k.shape, pk, more))
        return run(q, k, v, pk, pv, **more)

    monkeypatch.setattr(attention, "prefix_attention", spy)
    batch = inputs("llama", None)
    with pair.active():
        pair.model(**batch)
        pair.model(**batch, attention_mask=torch.ones(3, 9))
        pair.model(**inputs("llama"))
    for i, (shape, prefix, more) in enumerate(seen):
        assert tuple(shape) == (3, 2, 9, 8) and tuple(prefix.shape) == (2, P, 8)
        assert prefix.untyped_storage().data_ptr() == pair.weight.untyped_storage().data_ptr()
        assert more["causal"] and more.get("bias") is None
        assert (more["keep"] is not None) == (i >= 2 * LAYERS)
    assert len(seen) == 3 * LAYERS


# ------------------------------------------------------------------------------------ bad input


class Odd(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_models_that_are_not_supported() -> None:
    four = {"num_layers": LAYERS, "kv_heads": HEADS, "head_dim": 8, "num_virtual_tokens": P}
    with pytest.raises(ValueError, match="does not support Odd"):
        PrefixInjection(Odd(), **four)
    config = tf.DebertaV2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=24,
    )
    model = tf.AutoModel.from_config(config)
    before = [(n, len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match="DebertaV2Model"):
        PrefixInjection(model, **four)
    assert before == [(n, len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match="num_layers is 3"):
        PrefixInjection(make("llama"), **{**four, "num_layers": 3})
    with pytest.raises(ValueError, match="must be positive, got 0"):
        PrefixInjection(make("llama"), **{**four, "num_virtual_tokens": 0})
    pair = alone("llama")
    with pytest.raises(ValueError, match="takes prefixes already"):
        PrefixInjection(pair.model, **sizes(pair))


def test_prefixes_that_do_not_fit() -> None:
    pair = alone("llama")
    prefixes = pair.prefixes()
    with pytest.raises(ValueError, match="1 entries"), pair.injection.active(prefixes[:1]):
        pass
    short = [(k[:, 1:], v[:, 1:]) for k, v in prefixes]
    with pytest.raises(ValueError, match="allowed is"), pair.injection.active(short):
        pass
    with pytest.raises(ValueError, match="bool"), pair.active(no_prefix=torch.ones(3)):
        pass
    model = make("llama")
    wrong = PrefixInjection(model, num_layers=2, kv_heads=4, head_dim=8, num_virtual_tokens=P)
    many = [(torch.randn(4, P, 8), torch.randn(4, P, 8))] * 2
    with wrong.active(many), pytest.raises(ValueError, match="4 heads of 8; the keys"):
        model(**inputs("llama"))


def test_tasks_are_what_the_tests_think() -> None:
    assert task_of("bert") == "SEQ_CLS" and task_of("t5") == "SEQ_2_SEQ_LM"
