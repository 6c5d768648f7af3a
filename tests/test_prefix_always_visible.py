"""``prefix_always_visible``: a sliding window over own tokens, with the whole prefix in view.

The reference is the model itself over P + T tokens, with a complete mask of what is visible.
"""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peftkern
from peftkern.tuners.prefix_tuning import attention
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests.closeness import assert_same_number, differ
from tests.models import LAYERS, VOCAB
from tests.plain_reference import CACHE
from tests.prefix_models import P, Pair, inputs, make
from tests.test_prefix_injection import keys_of

WINDOW = 8  # of all these models
FAMILIES = ["mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "starcoder2"]


def explicit(base: Any, length: int) -> Any:
    """The mask [1, 1, P + T, P + T] of sliding layers (and of the full ones beside them)."""
    rows, columns = torch.arange(P + length)[:, None], torch.arange(P + length)[None]
    causal = columns <= rows
    sliding = causal & ((rows - columns < WINDOW) | (columns < P))
    kinds = {"full_attention": causal, "sliding_attention": sliding}
    added = {  # which every implementation understands
        kind: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)[None, None]
        for kind, mask in kinds.items()
    }
    return added if getattr(base.config, "layer_types", None) else added["sliding_attention"]


def injected(model: Any, keys: Any) -> PrefixInjection:
    _, heads, _, width = keys[0][0].shape
    return PrefixInjection(
        model,
        num_layers=LAYERS,
        kv_heads=heads,
        head_dim=width,
        num_virtual_tokens=P,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_is_what_an_explicit_mask_gives(family: str) -> None:
    g = torch.Generator().manual_seed(4)
    T = 14
    ids = torch.randint(3, VOCAB, (3, P + T), generator=g)
    base = make(family)
    with torch.no_grad():
        where = torch.arange(P + T)[None]
        mask = explicit(base, T)
        expected = base(ids, attention_mask=mask, position_ids=where, use_cache=False).logits[:, P:]
    keys = keys_of(base, input_ids=ids[:, :P])
    own = ids[:, P:]
    model = make(family)
    injection = injected(model, keys)
    with torch.no_grad(), injection.active(keys, always_visible=True):
        assert_same_number(model(own).logits, expected)
        padded = torch.nn.functional.pad(own, (0, 2), value=0)
        mask = padded.ne(0).long()
        assert_same_number(model(padded, attention_mask=mask).logits[:, :T], expected)
        # in steps, through a cache that slides
        cache, steps = None, []
        for part in (own[:, :6], *own[:, 6:].split(1, dim=1)):
            out = model(part, **{CACHE: cache}, use_cache=True)
            cache = getattr(out, CACHE)
            steps.append(out.logits)
        assert_same_number(torch.cat(steps, dim=1), expected)
        # a prefix for one row alone
        one = torch.tensor([False, True, True])
        with injection.active(keys, no_prefix=one, always_visible=True):
            rows = model(own).logits
        assert_same_number(rows[0], expected[0])
        assert_same_number(rows[1], base(own).logits[1])
    with torch.no_grad(), injection.active(keys):
        assert differ(model(own).logits, expected)


def test_a_window_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT's local attention: its own mask over P + T tokens, with the first P in view."""
    ids = torch.randint(3, VOCAB, (3, P + 14), generator=torch.Generator().manual_seed(4))
    model, keys, changed = make("modernbert").base_model, [], []
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def widen(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *a: Any, **more: Any) -> Any:
        if mask is not None:
            changed.append(int((~mask[..., P:, :P]).sum()))
            mask = mask.clone()
            mask[..., P:, :P] = True
        keys.append((k[:, :, :P], v[:, :, :P]))
        return run(module, q, k, v, mask, *a, **more)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", widen)
        expected = model(ids).last_hidden_state[:, P:]
    assert len(changed) == 1 and changed[0] > 0  # the local layer's
    injection = injected(model, keys)
    with torch.no_grad():
        with injection.active(keys, always_visible=True):
            assert_same_number(model(ids[:, P:]).last_hidden_state, expected)
        with injection.active(keys):
            assert differ(model(ids[:, P:]).last_hidden_state, expected)


def test_gradients() -> None:
    """Of all own tokens' losses, also of those that would have lost the prefix."""
    pair = Pair("mistral", peft_too=False)
    batch = inputs("mistral", None)
    grads = []
    pair.model.requires_grad_(False).train()
    for _ in range(2):
        with pair.active(always_visible=True):
            logits = pair.model(batch["input_ids"].repeat(1, 2)).logits
        logits[:, WINDOW + P :].square().mean().backward()
        grads.append(pair.weight.grad.clone())
        pair.weight.grad = None
        pair.model.gradient_checkpointing_enable()
    assert grads[0].any()
    assert_same_number(*grads)


def test_no_mask_where_no_window_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the window's length (P + T beyond it or not) nothing is masked but by causality."""
    seen: list[Any] = []
    run = attention.prefix_attention
    monkeypatch.setattr(
        attention, "prefix_attention", lambda *a, **k: (seen.append(k), run(*a, **k))[1]
    )
    pair = Pair("mistral", peft_too=False)
    ids = torch.full((2, WINDOW), 5)
    with torch.no_grad(), pair.active(always_visible=True):
        pair.model(ids)
        assert all(k.get("bias") is None and k["window"] is None and k["causal"] for k in seen)
        seen.clear()
        pair.model(torch.full((2, WINDOW + 1), 5))
    shapes = {tuple(k["bias"].shape[-2:]) for k in seen}
    assert shapes == {(WINDOW + 1, P + WINDOW + 1)}
    assert len({id(k["bias"]) for k in seen}) == 1  # one for all layers


# ------------------------------------------------------------------------------ as a setting


def tuned(base: Any, **settings: Any) -> Any:
    config = peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    return peftkern.get_peft_model(base, config).eval()


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def test_setting_travels_with_the_adapter(tmp_path: Any) -> None:
    ids = torch.arange(3, 20)[None].repeat(2, 1)
    model = tuned(make("mistral"), prefix_always_visible=True)
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(1))
    seen = logits(model, ids)
    model.save_pretrained(tmp_path / "seen")
    again = peftkern.PeftModel.from_pretrained(make("mistral"), str(tmp_path / "seen")).eval()
    assert again.peft_config["default"].prefix_always_visible is True
    assert torch.equal(logits(again, ids), seen)
    tokens = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    free = {"use_cache": False, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(tokens, model.generate(input_ids=ids, **free))

    # HF PEFT reads the file, says that it ignores the key, and lets the prefix slide
    with pytest.warns(UserWarning, match="prefix_always_visible"):
        theirs = peft.PeftModel.from_pretrained(make("mistral"), tmp_path / "seen").eval()
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, weight)
    assert differ(logits(theirs, ids), seen)

    # other adapters' files are as HF PEFT's, and it says nothing
    plain = tuned(make("mistral"))
    with torch.no_grad():
        plain.prompt_encoder["default"].embedding.weight.copy_(weight)
    plain.save_pretrained(tmp_path / "plain")
    assert "prefix_always_visible" not in json.loads(
        (tmp_path / "plain" / "adapter_config.json").read_text()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PrefixTuningConfig.from_pretrained(str(tmp_path / "plain"))
    assert config.num_virtual_tokens == P
    assert_same_number(logits(plain, ids), logits(theirs, ids))


def test_adapters_that_differ_in_it() -> None:
    ids = torch.arange(3, 20)[None].repeat(2, 1)
    model = tuned(make("mistral"))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    other = copy.deepcopy(model.peft_config["default"])
    other.prefix_always_visible = True
    model.add_adapter("seen", other)
    model.prompt_encoder["seen"].load_state_dict(model.prompt_encoder["default"].state_dict())
    slid = logits(model, ids)
    model.set_adapter("seen")
    assert differ(logits(model, ids), slid)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), slid)
    with pytest.raises(ValueError, match="adapter_names.*prefix_always_visible"):
        model(ids, adapter_names=["default", "seen"])


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="`prefix_always_visible` must be True or False, got 1"):
        peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", prefix_always_visible=1)
    with pytest.raises(ValueError, match="GPTNeoForCausalLM.*local attention"):
        tuned(make("gpt_neo"), prefix_always_visible=True)
    model = tuned(make("gpt_neo"))  # and beside another, which goes on as before
    ids = torch.arange(3, 20)[None]
    before = logits(model, ids)
    with pytest.raises(ValueError, match="local attention"):
        other = copy.deepcopy(model.peft_config["default"])
        other.prefix_always_visible = True
        model.add_adapter("seen", other)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, ids), before)
