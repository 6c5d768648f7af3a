"""transformers' continuous batching on adapted models: each request as if it came alone."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import peftkern
from peftkern.tuners.lora.row_adapters import AdapterNames
from peftkern.utils.handing import TokenNames
from tests.field import quietly, randomize
from tests.tiny import make

NEW = 4
PAGE = 4  # tokens
# its name since transformers 5.17, or the one before
PAGE_SIZE = next(
    name
    for name in ("page_size", "block_size")
    if name in inspect.signature(ContinuousBatchingConfig).parameters
)
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
# a family and what its adapters "a" and "b" have beyond LORA
MODELS = {
    "llama": ("llama", {}, {}),
    "gpt2": ("gpt2", {}, {"use_rslora": True}),
    "sliding": ("gemma2", {}, {}),
    "experts": ("qwen3_moe", _EXPERTS, _EXPERTS),
    "head": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"]},
    ),
    "trained": (
        "llama",
        {"modules_to_save": ["lm_head", "norm"], "target_modules": ["embed_tokens"]},
        {},
    ),
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}, {}),
}


def model_of(kind: str) -> peftkern.PeftModel:
    family, *settings = MODELS[kind]
    torch.manual_seed(0)
    model = make(family).double()
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # grouped products have no float64
    for i, (name, given) in enumerate(zip("ab", settings, strict=True)):
        config = peftkern.LoraConfig(r=2 + i, **{**LORA, **copy.deepcopy(given)})
        if i == 0:
            model = quietly(peftkern.get_peft_model, model, config, name)
        else:
            quietly(model.add_adapter, name, config)
        model.set_adapter(name)
        randomize(model, seed=i)
    model.double().set_adapter("a")
    return model.eval()


def settings(**more):
    return ContinuousBatchingConfig(
        **{"num_blocks": 64, PAGE_SIZE: PAGE, "max_batch_tokens": 16, **more}
    )


def generation(**more):
    return GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, **more
    )


def alone(model, prompt, name):
    """What ``generate`` says to one prompt."""
    found = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        adapter_names=[name],
        generation_config=generation(),
    )
    return found[0, len(prompt) :].tolist()


g = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 60, (n,), generator=g).tolist() for n in (3, 9, 20, 1)]
PROMPTS += [PROMPTS[2]] * 3  # these would share blocks
NAMES = ["a", "__base__", "a", "b", "b", "__base__", "a"]


@pytest.mark.parametrize("kind", MODELS)
def test_each_request_is_as_if_it_came_alone(kind):
    model = model_of(kind)
    want = [alone(model, *pair) for pair in zip(PROMPTS, NAMES, strict=True)]
    assert len({tuple(w) for w in (want[2], want[4], want[5])}) == 3  # the adapter matters
    found = model.generate_batch(
        PROMPTS,
        generation_config=generation(),
        continuous_batching_config=settings(),
        adapter_names=NAMES,
    )
    assert [r.generated_tokens for r in found.values()] == want
    assert [r.error for r in found.values()] == [None] * len(want)


def run(model, prompts=PROMPTS[:3], config=None, **given):
    found = model.generate_batch(
        prompts,
        generation_config=generation(),
        continuous_batching_config=config or settings(),
        **given,
    )
    return [r.generated_tokens for r in found.values()]


@pytest.fixture
def model():
    return model_of("llama")


def test_a_manager_takes_requests_with_and_without_names(model):
    """Names travel with requests; what is active when one is added is what it takes."""
    want = {n: [alone(model, p, n) for p in PROMPTS[:3]] for n in ("a", "b", "__base__")}
    short, _, long = PROMPTS[:3]
    forked = copy.copy(generation())
    forked.num_return_sequences = 2  # transformers refuses it in the constructor for greedy search
    with model.continuous_batching_context_manager(
        forked, continuous_batching_config=settings()
    ) as m:
        asked = {m.add_request(long, adapter_name="b"): want["b"][2]}
        model.set_adapter("b")
        asked[m.add_request(short)] = want["b"][0]
        with model.disable_adapter():
            asked[m.add_request(short)] = want["__base__"][0]
        ids = m.add_requests([short, long, long], adapter_names=["a", "a", "__base__"])
        asked |= zip(ids, [want["a"][0], want["a"][2], want["__base__"][2]], strict=True)
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c"):
            m.add_request(short, adapter_name="c")
        with pytest.raises(ValueError, match="adapter_names has 1 entries for 2 inputs"):
            m.add_requests([short, long], adapter_names=["a"])
        found = {}
        while len(found) < 2 * len(asked):
            result = m.get_result(timeout=60)
            assert result is not None
            found[result.request_id] = result.generated_tokens
    assert found == asked | {f"{k}__child#0": v for k, v in asked.items()}
    assert not hasattr(model.get_base_model(), "_cached_continuous_batching_manager")


def test_a_manager_that_is_kept(model):
    want = {n: [alone(model, p, n) for p in PROMPTS[:3]] for n in ("a", "b")}
    names = ["a", "b", "a"]
    keep = {"persistent_manager": True}
    mixed = [want[n][i] for i, n in enumerate(names)]
    assert run(model, adapter_names=names, **keep) == mixed
    assert run(model, adapter_names=names[::-1], **keep) == mixed
    model.set_adapter("b")
    assert run(model, **keep) == want["b"]
    model.destroy_cached_continuous_batching_manager()
    assert run(model, **keep) == want["b"]  # transformers' own, whose requests share blocks
    with pytest.raises(RuntimeError, match="call destroy_cached_continuous_batching_manager"):
        run(model, adapter_names=names)


def test_what_cannot_be_batched_is_said_before_anything_runs(model):
    names = ["a", "b", "a"]
    with pytest.raises(ValueError, match="2 entries for 3 inputs"):
        run(model, adapter_names=names[:2])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c"):
        run(model, adapter_names=["c", "b", "a"])
    with pytest.raises(ValueError, match="in training mode"):
        run(model.train(), adapter_names=names)
    model.eval()
    for given in (
        {"use_cuda_graph": True},
        {"default_compile_level": 1},
        {"use_async_batching": True},
    ):
        with pytest.raises(ValueError, match=f"continuous_batching_config.{next(iter(given))} is "):
            run(model, config=settings(**given), adapter_names=names)
    model.base_model.set_adapter(["a", "b"])
    with model.continuous_batching_context_manager(
        generation(), continuous_batching_config=settings()
    ) as m:
        with pytest.raises(ValueError, match=r"several adapters are active \(a, b\)"):
            m.add_request([1, 2])
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        run(model, adapter_names=names)


def test_methods_without_a_door():
    for config in (
        peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        prompted = peftkern.get_peft_model(make("llama"), config).eval()
        for given in ({}, {"adapter_names": ["default"] * 3}):
            with pytest.raises(NotImplementedError, match="would ignore the prompt of P"):
                run(prompted, **given)
    classifier = peftkern.get_peft_model(
        make("bert", "SEQ_CLS"), peftkern.LoraConfig(task_type="SEQ_CLS")
    )
    with pytest.raises(
        NotImplementedError, match="BertForSequenceClassification has no generate_batch"
    ):
        run(classifier)
    alora = peftkern.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    invoked = peftkern.get_peft_model(make("llama"), alora).eval()
    for given in ({}, {"adapter_names": ["default"] * 3}):
        with pytest.raises(NotImplementedError, match="of 'default' without its alora_offsets"):
            run(invoked, **given)


def test_rows_of_a_copy_that_has_an_adapter():
    """An adapter on a module that another trains in full gets that copy's rows alone."""
    model = model_of("trained")
    ids, names = torch.tensor([PROMPTS[2][:4]] * 3), ["a", "b", "__base__"]
    together = model(input_ids=ids, adapter_names=names).logits
    apart = [model(input_ids=ids[:1], adapter_names=[n]).logits for n in names]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


def test_a_layer_that_mixes_tokens_is_named(model):
    """A convolution's rows are samples; here they would be tokens."""
    mixer = torch.nn.Conv1d(16, 16, 3, padding=1)
    model.base_model.model.model.mixer = mixer
    model.add_adapter("c", peftkern.LoraConfig(r=2, target_modules=["mixer"]))
    with pytest.raises(NotImplementedError, match=r"mixer \(Conv1d\) takes the tokens of a sample"):
        run(model, adapter_names=["a", "b", "a"])


@pytest.mark.parametrize("kind", ["head", "trained"])
def test_a_head_gets_the_adapters_of_the_tokens_it_is_given(kind):
    """Also where they are as many as all tokens: one for each request, b's a piece of a prompt.

    The place that b's request has among the logits stays at token 0, as transformers leaves it.
    """
    model = model_of(kind)
    names = TokenNames(AdapterNames(["a", "b", "__base__"]), AdapterNames(["a", "__base__", "a"]))
    ids, rows = torch.tensor([[3, 5, 4]]), torch.tensor([0, 2, 0])
    alone = [model(input_ids=ids[:, i : i + 1], adapter_names=[names.each[i]]) for i in range(3)]
    want = torch.cat([out.logits[0] for out in alone])
    row = {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        "attention_mask": torch.eye(3, dtype=torch.bool)[None, None],  # each token is a text
    }
    base = model.get_base_model()
    with model.base_model.handing_tokens(names, head_takes_kept=True):
        some = base(**row, logits_to_keep=rows).logits[0]
    with model.base_model.handing_tokens(names, head_takes_kept=False):
        full = base(**row).logits[0]
    torch.testing.assert_close(some, want[rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(full, want, rtol=1e-12, atol=1e-12)
