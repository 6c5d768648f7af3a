"""A model that these tests do not cover is compared with its cache before its first prefix.

So no model computes something else without a warning.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

import peftkern
from peftkern.ops import notes
from peftkern.tuners.prefix_tuning import families, way
from tests import test_prefix_more_families as more
from tests.closeness import assert_same_number, differ
from tests.plain_reference import with_prefix
from tests.prefix_models import NAMES, P, config, split
from tests.prefix_zoo import weight_of
from tests.test_prefix_unusual_layers import INJECTED


class Attention(llama.LlamaAttention):
    """Llama's attention in a class that is not tested.

    With ``turned`` it reverses the order of the heads that it gets from the cache, so that a prefix
    that is inserted afterwards meets the wrong heads.
    """

    turned = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache: Any = None,  # its name from transformers 5.24 on
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if self.turned:
            k, v = k.flip(1), v.flip(1)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        out, weights = run(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class Turned(Attention):
    turned = True


def toy(kind: type, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config("llama"))
    for i, layer in enumerate(model.model.layers):
        own: Any = kind(model.config, i)
        own.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = own
    return model.to(dtype).eval()


CONFIG = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def tuned(model: Any, library: Any = peftkern) -> Any:
    model = library.get_peft_model(model, library.PrefixTuningConfig(**CONFIG))
    with torch.no_grad():
        weight_of(model).normal_(generator=torch.Generator().manual_seed(1))
    return model.to(next(model.base_model.parameters()).dtype).eval()


def reference(model: Any, bare: Any) -> Tensor:
    """The logits with the prefix in the cache."""
    config = model.peft_config["default"]
    pairs = split(weight_of(model), config.num_attention_heads, config.num_layers, False)
    return with_prefix(bare, pairs, input_ids=IDS).logits


# -------------------------------------------------------------------- it is caught


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_that_slips_past_is_caught(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match="The prefix of LlamaForCausalLM goes through its cache"):
        model = tuned(toy(Turned, dtype))
    (row,) = peftkern.explain(model)
    assert row.backend == "keys and values in the cache"
    assert "injected, it comes out otherwise than through the cache" in row.reason
    if dtype == torch.float64:
        logits = model(input_ids=IDS).logits
        assert_same_number(logits, reference(model, toy(Turned)))
        assert_same_number(logits, tuned(toy(Turned), peft)(input_ids=IDS).logits)


def test_several_ends_of_a_text() -> None:
    """GLM's ``eos_token_id`` is a list; none of its tokens is what the model is run on."""
    model = toy(Turned)
    model.config.eos_token_id = [3, 4]
    with pytest.warns(UserWarning, match="goes through its cache"):
        tuned(model)


def test_without_the_comparison_it_is_not(monkeypatch: Any) -> None:
    """Without the comparison of the test above, the toy would be wrong without a warning."""
    monkeypatch.setattr("peftkern.tuners.prefix_tuning.way.is_verified", lambda *_: True)
    model = tuned(toy(Turned))
    assert differ(model(input_ids=IDS).logits, reference(model, toy(Turned)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_is_right_is_injected(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tuned(toy(Attention, dtype))
    rows = peftkern.explain(model)
    assert len(rows) == 2 and all("cache" not in row.reason for row in rows)
    if dtype == torch.float64:
        assert_same_number(model(input_ids=IDS).logits, reference(model, toy(Attention)))


def test_attention_that_fails_is_caught() -> None:
    class Demanding(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "peftkern_prefix" in kwargs:
                raise TypeError("an argument that it does not know")  # ALL_ATTENTION_FUNCTIONS
            return super().forward(*args, **kwargs)

    with pytest.warns(UserWarning, match="TypeError: an argument that it does not know"):
        model = tuned(toy(Demanding))
    assert_same_number(model(input_ids=IDS).logits, reference(model, toy(Attention)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_under_autocast(dtype: torch.dtype) -> None:
    """The rounding that the comparison allows is autocast's, not that of the weights."""
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        model = tuned(toy(Attention, dtype))
    assert "cache" not in peftkern.explain(model)[0].reason
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="its cache"):
        tuned(toy(Turned, dtype))


# -------------------------------------------------------------------- attention of the user's own


@pytest.fixture
def implementations() -> Any:
    """Registers "threefold" and "as sdpa"; the first is what no prefix operation knows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as plain

    def threefold(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return plain(*args, scaling=3 * scaling, **kwargs)

    def as_sdpa(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    both = {"threefold": threefold, "as sdpa": functools.partial(as_sdpa)}
    for name, function in both.items():
        tf.AttentionInterface.register(name, function)
        tf.AttentionMaskInterface.register(name, sdpa_mask)
    yield
    for name in both:
        del tf.AttentionInterface._global_mapping[name]
        del tf.AttentionMaskInterface._global_mapping[name]


def with_attention(name: str) -> Any:
    model = toy(llama.LlamaAttention)
    model.set_attn_implementation(name)
    return model


def test_attention_of_ones_own(implementations: None) -> None:
    """A kind that is verified is so with transformers' attention."""
    with pytest.warns(UserWarning, match="goes through its cache"):
        model = tuned(with_attention("threefold"))
    logits = model(input_ids=IDS).logits
    assert_same_number(logits, reference(model, with_attention("threefold")))
    assert differ(logits, reference(model, with_attention("sdpa")))


def test_attention_of_ones_own_chosen_later(implementations: None) -> None:
    model = tuned(with_attention("sdpa"))
    before = model(input_ids=IDS).logits
    assert_same_number(before, reference(model, with_attention("sdpa")))
    base = model.get_base_model()
    base.set_attn_implementation("as sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(input_ids=IDS).logits, before)
    compared = model.tuner.injection
    assert "cache" not in peftkern.explain(model)[0].reason
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert copy.deepcopy(model).tuner.injection.judged == compared.judged
    base.set_attn_implementation("eager")  # transformers' own is not compared
    assert_same_number(model(input_ids=IDS).logits, before)
    assert model.tuner.injection is compared
    base.set_attn_implementation("threefold")
    with pytest.warns(UserWarning, match="goes through its cache"):
        logits = model(input_ids=IDS).logits
    assert_same_number(logits, reference(model, with_attention("threefold")))


# -------------------------------------------------------------------- it leaves no trace


def test_the_model_is_left_as_it_was() -> None:
    model = toy(Attention)
    model.model.layers[0].train()
    model.register_buffer("count", torch.zeros(()))
    calls: list[Any] = []

    def count(module: Any, args: Any) -> None:
        calls.append(args)

    def keep(module: Any, args: Any, output: Any) -> None:
        model.count += 1
        model.last = output

    model.model.register_forward_pre_hook(count)
    model.lm_head.register_forward_hook(keep)

    class Counting(torch.nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.norm = norm
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1  # in place
            self.last = x
            return self.norm(x) + 0.0 * torch.rand(())  # and draws

    model.model.norm = Counting(model.model.norm)
    modes = [m.training for m in model.modules()]
    names = [set(vars(m)) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    tuner = peftkern.get_peft_model(model, peftkern.PrefixTuningConfig(**CONFIG))
    tuner.prompt_encoder["default"].embedding.weight.data.zero_()
    assert not calls and model.count == 0 and model.model.norm.seen == 0
    assert [m.training for m in model.modules()] == modes
    marks = {"_peftkern_prefix_slot"}
    assert [set(vars(m)) - marks for m in model.modules()] == names
    torch.manual_seed(3)
    tuner.tuner.injection = None  # and again, the random numbers looked at alone
    for module in model.modules():
        module.__dict__.pop("_peftkern_prefix_slot", None)
    torch.set_rng_state(state)
    tuner.tuner.inject(tuner, tuner.active_peft_config)
    assert torch.equal(torch.get_rng_state(), state)
    tuner(input_ids=IDS)
    assert len(calls) == 1 and model.count == 1 and model.model.norm.seen == 1


# -------------------------------------------------------------------- it cannot be made


def test_weights_that_are_not_here() -> None:
    """Then it is made up for before the first call."""
    tuner = late(Turned)
    with pytest.warns(UserWarning, match="goes through its cache"):
        logits = tuner(input_ids=IDS).logits
    assert_same_number(logits, reference(tuner, toy(Turned)))


def late(kind: type) -> Any:
    """A tuned model whose weights came after its prefix."""
    with torch.device("meta"):
        model = toy(kind)
    tuner = peftkern.get_peft_model(model, peftkern.PrefixTuningConfig(**CONFIG))
    assert "not compared with the cache: some of its weights" in peftkern.explain(tuner)[0].reason
    real = toy(kind)
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    for module, own in zip(model.modules(), real.modules(), strict=True):
        for name, buffer in own._buffers.items():
            module._buffers[name] = buffer
    with torch.no_grad():
        weight_of(tuner).normal_(generator=torch.Generator().manual_seed(1))
    return tuner.double().eval()


@pytest.mark.parametrize("kind", [Attention, Turned])
@pytest.mark.filterwarnings("ignore:The prefix of LlamaForCausalLM goes through its cache")
def test_made_up_for_by_one_of_several_threads(kind: type, monkeypatch: Any) -> None:
    tuner = late(kind)
    expected = reference(tuner, toy(kind))
    count, all_here, compared = 3, threading.Barrier(3), []
    choose, again = way.choose, way.again

    def counted(*args: Any, **kwargs: Any) -> Any:
        compared.append(threading.get_ident())
        return choose(*args, **kwargs)

    asked = threading.local()

    def ask(*args: Any) -> bool:
        answer = again(*args)
        if not hasattr(asked, "once"):  # all have heard that it is to be made up for
            asked.once = True
            all_here.wait(60)
        return answer

    monkeypatch.setattr(way, "choose", counted)
    monkeypatch.setattr(way, "again", ask)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            return tuner(input_ids=IDS).logits

    with ThreadPoolExecutor(count) as pool:
        for logits in pool.map(run, range(count)):
            assert_same_number(logits, expected)
    assert len(compared) == 1


@pytest.mark.parametrize("kind", [Attention, Turned])
def test_weights_that_accelerate_brings(kind: type) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = toy(kind)
    accelerate.cpu_offload(model)
    assert next(model.parameters()).is_meta
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuner = tuned(model)
    assert [("goes through its cache" in str(w.message)) for w in said] == [True] * (kind is Turned)
    assert "not compared" not in peftkern.explain(tuner)[0].reason
    assert all(p.is_meta for p in model.parameters())
    assert_same_number(tuner(input_ids=IDS).logits, reference(tuner, toy(kind)))


def test_a_model_that_wants_more_than_tokens() -> None:
    class Wanting(tf.LlamaForCausalLM):
        def forward(self, *args: Any, pixels: Tensor, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    model = tuned(Wanting(config("llama")).double())
    assert "does not run on 3 tokens alone (TypeError" in peftkern.explain(model)[0].reason
    logits = model(input_ids=IDS, pixels=IDS).logits
    assert differ(logits, model.base_model(input_ids=IDS, pixels=IDS).logits)


# -------------------------------------------------------------------- who is not compared


def test_the_list_of_verified_kinds_is_what_tests_verify() -> None:
    tested = [*NAMES, *more.FAMILIES, *more.SLOW, *INJECTED]
    kinds = {config(family).model_type for family in tested}
    elsewhere = {"whisper", "llava", "qwen2_5_vl", "qwen2_5_vl_text"}  # test_prefix_more_families
    elsewhere |= {"deberta", "deberta-v2"}  # test_prefix_deberta
    assert families.VERIFIED == kinds | elsewhere


def test_a_verified_kind_is_not_run(monkeypatch: Any) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr("peftkern.tuners.prefix_tuning.way.run_cached", run)
    model = tf.LlamaForCausalLM(config("llama"))
    tuned(copy.deepcopy(model))
    with pytest.raises(AssertionError, match="it was run"):
        tuned(toy(Attention))
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda *a, **k: None)
    with pytest.raises(AssertionError, match="it was run"):
        tuned(model)


def test_under_another_transformers_every_kind_is_compared(monkeypatch: Any) -> None:
    monkeypatch.setattr(tf, "__version__", "5.99.0.dev0")
    notes._said.clear()
    compared: list[Any] = []
    judge = way.judge
    monkeypatch.setattr(way, "judge", lambda *a: compared.append(judge(*a)) or compared[-1])
    with pytest.warns(UserWarning, match=r"tested with transformers 5.15 to 5.24, this is 5.99"):
        tuned(tf.LlamaForCausalLM(config("llama")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        tuned(tf.GPT2LMHeadModel(config("gpt2")))
        tuned(tf.BloomForCausalLM(config("bloom")))  # these compute attention in their layers
        tuned(tf.MptForCausalLM(config("mpt")))
    assert compared == [(True, "")] * 4
