"""The injection has no side effects: threads, copies, removal, errors before wrong results."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from peftkern.tuners.prefix_tuning import attention
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests import models
from tests.closeness import assert_same_number, differ
from tests.models import LAYERS
from tests.prefix_models import HEADS, P, Pair, alone, inputs, make, sizes
from tests.prefix_zoo import tuned

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
            if not torch.equal(got, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert differ(expected[1], expected[2])


def test_a_model_that_swallows_the_prefix() -> None:
    """StableLM hands no keyword to its attention; a caller's own mask cannot carry the prefix."""
    pair = alone("stablelm")
    ids = torch.full((1, 5), 7)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    pair.model(ids, attention_mask=mask)
    with pair.active():
        pair.model(ids)
        with pytest.raises(RuntimeError, match="StableLmForCausalLM.*layers \\[0, 1\\]"):
            pair.model(ids, attention_mask=mask)


def test_a_later_choice_of_implementation() -> None:
    """It becomes the one that stands behind; the prefix is not lost."""
    pair = Pair("llama")
    batch = inputs("llama")
    pair.model.set_attn_implementation("eager")
    with pair.active():
        ours = pair.model(**batch, output_attentions=True)
    for oracle, _ in pair.oracles():
        assert_same_number(ours.logits, oracle(**batch).logits)
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
    assert model.config.to_dict() == fresh.config.to_dict()
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
    if how == "deepcopy":
        twin = copy.deepcopy(both)
    else:
        kept = pickle.dumps(both)
        name = pair.model.config._attn_implementation
        if attention.original_of(name) is not None:  # a new process may not know it
            for interface in (tf.AttentionInterface, tf.AttentionMaskInterface):
                del interface._global_mapping[name]
        twin = pickle.loads(kept)
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


@pytest.mark.parametrize("family", ["llama", "bloom", "ctrl"])  # interface, blocks, cache
def test_a_failed_call_keeps_no_model_alive(family: str) -> None:
    model = tuned(peftkern, family) if family == "ctrl" else None
    if model is None:
        config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        model = peftkern.get_peft_model(make(family), config)
    injection = model.tuner.injection

    def fail(*_: Any) -> None:
        raise KeyError("in a layer")

    norms = [m for m in injection.stack.modules() if "Norm" in type(m).__name__]
    norms[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in a layer"):
        model(input_ids=torch.arange(3, 8)[None])
    kept = [
        weakref.ref(x) for x in (injection, injection.stack, *model.prompt_encoder.parameters())
    ]
    del model, injection, norms
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_failed_call_leaves_no_prefix_in_masks() -> None:
    """generate() makes masks before it calls the model; that call says whose prefix they carry."""
    pair = alone("stablelm")
    batch = inputs("stablelm", "left")
    del batch["labels"]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "cache_implementation": "static"}
    expected = pair.base.generate(**batch, **how)

    def fail(*_: Any) -> None:
        raise KeyError("in the second layer")

    handle = pair.injection.layers[1].register_forward_pre_hook(fail)
    with pair.active(), pytest.raises(KeyError, match="second layer"):
        pair.model(**batch)
    handle.remove()
    assert torch.equal(pair.model.generate(**batch, **how), expected)
    with pair.active():
        assert not torch.equal(pair.model.generate(**batch, **how), expected)


def test_layers_without_a_prefix() -> None:
    pair = alone("llama")
    batch = inputs("llama")
    prefixes = pair.prefixes()
    with torch.no_grad():
        with pair.injection.active([None, None]):
            # positions still stand behind: relative ones, so it is the model alone
            assert_same_number(pair.model(**batch).logits, pair.base(**batch).logits)
        with pair.injection.active([prefixes[0], None]):
            half = pair.model(**batch).logits
        with pair.active():
            assert differ(half, pair.model(**batch).logits)


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
    model = tf.AutoModel.from_config(models.config("fnet"))  # which has no attention
    before = [(n, len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match="FNetModel"):
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
