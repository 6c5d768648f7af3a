"""``peftkern.runner``: the tokens of ``generate``, step by step."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import peftkern
from peftkern import running
from tests.field import quietly, randomize
from tests.tiny import make

NEW = 5
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = IDS.clone()
PADDED[0, :4], PADDED[1, :1] = 0, 0
MASK = (PADDED != 0).long()

CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: peftkern.LoraConfig(r=3, target_modules="all-linear", **CAUSAL),
    "alora": lambda: peftkern.LoraConfig(r=3, alora_invocation_tokens=[int(IDS[0, 5])], **CAUSAL),
    "prefix": lambda: peftkern.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt": lambda: peftkern.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p_tuning": lambda: peftkern.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL
    ),
}


def model_of(method="lora", family="llama"):
    torch.manual_seed(0)
    model = quietly(peftkern.get_peft_model, make(family).double(), METHODS[method](), "a")
    randomize(model, seed=1)
    quietly(model.add_adapter, "b", METHODS[method]())
    model.set_adapter("b")
    randomize(model, seed=2)
    model.double().set_adapter("a")
    return model.eval()


def generated(model, ids=IDS, mask=None, **given):
    mask = torch.ones_like(ids) if mask is None else mask
    config = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    config = GenerationConfig(**{**config, **given.pop("config", {})})
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **given)


def ran(run, ids=IDS, mask=None, **given):
    return run.generate(ids, mask, NEW, **{"eos_token_id": [], **given})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "qwen3_moe"])
def test_lora_on_families(family):
    model = model_of(family=family)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # grouped products have no float64
    run = peftkern.runner(model)
    assert torch.equal(ran(run), generated(model))
    assert torch.equal(ran(run, PADDED, MASK), generated(model, PADDED, MASK))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_other_methods(method):
    model = model_of(method)
    run = peftkern.runner(model)
    for ids, mask in ((IDS, None), (PADDED, MASK)):
        assert torch.equal(ran(run, ids, mask), generated(model, ids, mask))
    with model.disable_adapter():
        plain = generated(model)
        assert torch.equal(ran(run), plain)
    assert not torch.equal(ran(run), plain)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_rows_with_adapters_of_their_own(method):
    model = model_of(method)
    names = ["b", "a", "b"] if method == "prompt" else ["b", "__base__", "a"]
    want = generated(model, PADDED, MASK, adapter_names=names)
    run = peftkern.runner(model)
    tokens = []
    for token in run.stream(PADDED, MASK, NEW, adapter_names=names, eos_token_id=[]):
        tokens.append(token)
        model(input_ids=IDS)  # names are not left to calls in between
    assert torch.equal(torch.stack(tokens, 1), want[:, IDS.shape[1] :])
    assert not torch.equal(ran(run, PADDED, MASK), want)


class Recorded:
    """A CUDA graph on a CPU: the calls that warm it up, and then the call itself."""

    made = 0

    def __init__(self, run, device):
        type(self).made += 1
        assert not torch.is_grad_enabled()  # else each replay would be a step of one endless graph
        with NothingWaits():
            for _ in range(3):
                run()
        self.replay = run


class NothingWaits(torch.utils._python_dispatch.TorchDispatchMode):
    """What a capture refuses: reading a number on the host, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "equal"}, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(running, "Graph", Recorded)
    monkeypatch.setattr(running, "why_no_graph", lambda device: None)
    Recorded.made = 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recorded_steps(recording, family):
    """A step may only read and write tensors that stay; and no number comes to the host."""
    model = model_of(family=family)
    run = peftkern.runner(model, max_length=24)
    for ids, mask in ((IDS, None), (PADDED, MASK), (IDS, None)):
        assert torch.equal(ran(run, ids, mask), generated(model, ids, mask))
    names = ["b", "__base__", "a"]
    for _ in range(2):
        want = generated(model, PADDED, MASK, adapter_names=names)
        assert torch.equal(ran(run, PADDED, MASK, adapter_names=names), want)
    model.set_adapter("b")
    assert torch.equal(ran(run), generated(model))
    assert Recorded.made == 3
    run.reset()
    assert torch.equal(ran(run, IDS[:1]), generated(model, IDS[:1]))
    assert Recorded.made == 4


def test_what_is_not_recorded(recording):
    with pytest.raises(NotImplementedError, match="layers of several kinds"):
        peftkern.runner(model_of(family="gemma2"), graph=True)
    with pytest.raises(NotImplementedError, match="steps with a prompt are not recorded"):
        peftkern.runner(model_of("prefix"), graph=True)
    run = peftkern.runner(model_of("alora"), graph=True)
    with pytest.raises(NotImplementedError, match="a step takes alora_offsets"):
        ran(run)
    assert Recorded.made == 0
    model = model_of()
    assert torch.equal(ran(peftkern.runner(model, graph=False)), generated(model))
    assert Recorded.made == 0


def test_no_graph_on_a_cpu():
    with pytest.raises(NotImplementedError, match="graph=True: the model is on cpu"):
        peftkern.runner(model_of(), graph=True)


def test_ends():
    """A row that has ended is padded; the loop ends with the last row."""
    model = model_of()
    free = ran(peftkern.runner(model))
    end = [int(free[0, -3]), int(free[1, -4])]
    want = generated(model, config={"eos_token_id": end})
    assert torch.equal(ran(peftkern.runner(model), eos_token_id=end, pad_token_id=0), want)
    one = int(free[0, IDS.shape[1]])
    assert ran(peftkern.runner(model), IDS[:1], eos_token_id=one).shape[1] == IDS.shape[1] + 1
    model.get_base_model().generation_config.eos_token_id = one  # the model's own is what counts
    assert ran(peftkern.runner(model), IDS[:1], eos_token_id=None).shape[1] == IDS.shape[1] + 1


def test_samples():
    model = model_of()
    run = peftkern.runner(model)
    how = {"temperature": 0.7, "top_k": 9, "top_p": 0.9}
    torch.manual_seed(3)
    want = generated(model, config={"do_sample": True, **how})
    torch.manual_seed(3)
    assert torch.equal(ran(run, **how), want)
    draws = [
        ran(run, temperature=5.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_what_is_wrong_is_said_at_once():
    model = model_of()
    run = peftkern.runner(model, max_length=12)
    for given, words in (
        ((IDS[0],), r"input_ids: \[9\] was given; allowed: \[B, T\]"),
        ((IDS, MASK[:2]), r"attention_mask: \[2, 9\] was given; allowed: input_ids' \[3, 9\]"),
        ((IDS, MASK.flip(1)), "attention_mask ends with padding"),
        ((IDS, None, 0), "max_new_tokens is 0; allowed: a number from 1 on"),
        ((IDS, None, 4), "up to 13 tokens; allowed: max_length, 12"),
    ):
        with pytest.raises(ValueError, match=words):
            run.stream(*given)
    for given, words in (
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        ({"top_k": 3}, "allowed: with a temperature"),
        ({"adapter_names": ["a"]}, "1 entries for 3 rows"),
        ({"adapter_names": ["a", "c", "b"]}, r"non-existing adapter\(s\): c"),
    ):
        with pytest.raises(ValueError, match=words):
            run.stream(IDS, None, 1, **given)
    with pytest.raises(ValueError, match="in training mode"):
        peftkern.runner(model.train()).stream(IDS)
    for length in (0, 10**6):
        with pytest.raises(ValueError, match=f"max_length is {length}"):
            peftkern.runner(model, max_length=length)


def test_models_without_steps():
    config = peftkern.LoraConfig(task_type="SEQ_2_SEQ_LM")
    with pytest.raises(NotImplementedError, match="T5.* is no decoder with a cache"):
        peftkern.runner(peftkern.get_peft_model(make("t5", "SEQ_2_SEQ_LM"), config))
    config = peftkern.LoraConfig(task_type="SEQ_CLS")
    with pytest.raises(NotImplementedError, match="Bert.*"):
        peftkern.runner(peftkern.get_peft_model(make("bert", "SEQ_CLS"), config))
