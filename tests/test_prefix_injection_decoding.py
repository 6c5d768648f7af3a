"""Decoding with a prefix outside the cache: any cache or none, beams, rows, torch.compile."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version

from peftkern.tuners.prefix_tuning import attention, blocks
from tests.closeness import assert_same_number, differ
from tests.models import SEQ2SEQ
from tests.plain_reference import CACHE, TRANSFORMERS
from tests.prefix_models import IN_BLOCKS, Pair, alone, inputs, split

# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "t5", "bart", "opt", *IN_BLOCKS])
def test_generation_without_a_cache(family: str) -> None:
    pair = alone(family) if family != "falcon_mqa" else Pair(family)
    batch = inputs(family, "left")
    del batch["labels"]
    with pair.active():
        cached = pair.model.generate(**batch, max_new_tokens=6)
        assert torch.equal(pair.model.generate(**batch, max_new_tokens=6, use_cache=False), cached)


STATIC = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "t5", "bart"]
STATIC += ["bloom", "gptj", "codegen", "falcon", "falcon_mqa", "mpt"]


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


@pytest.mark.parametrize("family", ["t5", "mt5", "bloom", "falcon", "gptj", "gpt_neo", "bart"])
def test_a_step_makes_nothing_twice(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask or bias that all layers share is made once, and no signature is read."""
    pair, made, read = alone(family), [], []
    for module, name in [
        *((blocks, name) for name in ("_wider", "_bloom", "_with_alibi")),
        (attention, "_with_bias"),
    ]:
        make = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, n=name, f=make, **k: made.append(n) or f(*a, **k)
        )
    signature = inspect.signature

    def reading(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        read.extend([caller] if caller.startswith("peftkern") else [])
        return signature(*args, **kwargs)

    batch = inputs(family, "left")
    batch.pop("labels", None)
    batch |= {"decoder_input_ids": batch["input_ids"][:, :1]} if family in SEQ2SEQ else {}
    with pair.active(), torch.no_grad():
        expected = pair.model(**batch).logits
        first, seen = list(made), set(made)
        monkeypatch.setattr(inspect, "signature", reading)
        assert torch.equal(pair.model(**batch).logits, expected)
    assert not read and made == 2 * first
    assert len(first) == len(seen), first


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_classifier_free_guidance(family: str) -> None:
    """The prefix belongs to the tuned model: the pass without the text has it as well."""
    pair, scale = alone(family), 1.5
    tokens = inputs(family, None)["input_ids"][:1]
    begin = tokens.shape[1] - 1  # the pass without the text begins with its last token
    with pair.active(), torch.no_grad():
        found = pair.model.generate(tokens, max_new_tokens=5, guidance_scale=scale)
        plain = pair.model.generate(tokens, max_new_tokens=5)
        for _ in range(5):
            texts = (tokens, tokens[:, begin:])
            full, none = (pair.model(ids).logits[:, -1].log_softmax(-1) for ids in texts)
            chosen = (none + scale * (full - none)).argmax(-1)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    assert torch.equal(found, tokens) and not torch.equal(found, plain)


@pytest.mark.parametrize("family", ["gpt_neo", "falcon_alibi"])
def test_static_cache_where_the_model_itself_is_wrong(family: str) -> None:
    pair = alone(family)
    ids = inputs(family, None)["input_ids"]
    cache = tf.StaticCache(config=pair.model.config, max_cache_len=16)
    with pair.active(), pytest.raises(ValueError, match="use a dynamic cache"):
        pair.model(ids, **{CACHE: cache})


@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt", *IN_BLOCKS])
def test_a_callers_own_cache(family: str, padding: str | None) -> None:
    """Continued from it, and it holds the tokens alone."""
    pair = Pair(family)
    batch = inputs(family, padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    caches = [tf.DynamicCache(config=pair.model.config)]
    if family == "bloom":  # its own bias wants a mask as long as a static cache
        static = padding is None and TRANSFORMERS >= Version("5.23")
    else:
        static = family in STATIC
    if static:
        caches.append(tf.StaticCache(config=pair.model.config, max_cache_len=16))
    with torch.no_grad(), pair.active():
        whole = pair.model(ids, attention_mask=mask).logits
        for cache in caches:
            parts = []
            for a, b in ((0, 4), (4, 8), (8, 9)):
                seen = None if mask is None else mask[:, :b]
                call = {"attention_mask": seen, CACHE: cache}
                parts.append(pair.model(ids[:, a:b], **call).logits)
            assert cache.get_seq_length() == 9
            real = slice(None) if mask is None else mask.bool()
            assert_same_number(torch.cat(parts, dim=1)[real], whole[real])


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
        assert_same_number(a, b)
    assert differ(bare, full)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "bloom"])
def test_a_prefix_for_each_row_with_beams(family: str) -> None:
    pair = alone(family, dtype=torch.float32)  # Bloom alone has no number for padding in float64
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


def slow(*families: str) -> list[Any]:
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("family", ["llama", *slow("gpt2", "bert", "t5", "mistral", "bloom")])
def test_compiled_forward_and_backward(family: str) -> None:
    torch._dynamo.reset()
    pair = alone(family)
    pair.model.requires_grad_(False)
    batch = inputs(family)
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = batch["labels"]
    del batch["labels"]
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=True)

    def both(factor: float) -> None:
        found = []
        for model in (pair.model, compiled):
            with pair.injection.active(pair.prefixes(pair.weight * factor)):
                out = model(**batch).logits
            loss = (out * torch.linspace(-1, 1, out.numel()).cos().view_as(out)).sum()
            found.append((out, torch.autograd.grad(loss, pair.weight)[0]))
        assert_same_number(found[1], found[0])

    both(1.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        both(-1.0)  # another prefix is another input, not a constant of the graph


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", *slow("gemma2", "gpt2", "gptj")])
def test_compiled_static_decode(family: str) -> None:
    torch._dynamo.reset()
    pair = alone(family)
    ids = inputs(family, None)["input_ids"]
    step = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pair.active():
        expected = pair.model(ids).logits
        cache = tf.StaticCache(config=pair.model.config, max_cache_len=16)
        pair.model(ids[:, :4], **{CACHE: cache})
        for t in range(
            4, 8
        ):  # at 8 a sliding cache is full, and compiles anew without a prefix too
            where = torch.full((3, 1), t)
            stance = "default" if t < 6 else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                got = step(ids[:, t : t + 1], **{CACHE: cache}, position_ids=where).logits
            assert_same_number(got[:, 0], expected[:, t])
