"""Eight threads on one model: each gets the same result as alone, whatever the others do."""

from __future__ import annotations

import threading

import pytest
import torch

import peftkern
from peftkern.tuners.lora import group as groups
from peftkern.tuners.lora.row_adapters import AdapterNames
from tests.closeness import assert_same_number
from tests.tiny import fill, first, inputs, make

THREADS = 8


def together(model, block, calls, rounds=3):
    """The results of each call when all are made at once, each in a thread of its own.

    The threads wait for each other before ``block``, in the middle of the forward, so that all are
    in it at the same time.
    """
    meet = threading.Barrier(len(calls), timeout=60)
    handle = model.get_submodule(block).register_forward_pre_hook(lambda *_: (meet.wait(), None)[1])
    got, failed = [[] for _ in calls], []

    def run(i):
        try:
            for _ in range(rounds):
                got[i].append(calls[i]())
        except BaseException as e:
            failed.append(e)
            meet.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    if failed:
        raise next(
            (e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0]
        )
    return got


def assert_as_alone(model, block, calls):
    alone = [call() for call in calls]
    for found, wanted in zip(together(model, block, calls), alone, strict=True):
        for each in found:
            assert_same_number(each, wanted)
    assert len({round(float(x.abs().sum()), 3) for x in alone}) > len(alone) // 2


def randomize(model):
    """Random numbers in all that trains: LoRA's weights, prompts, heads."""
    fill(model)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "prompt_encoder" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return model.eval()


def lora(task, **settings):
    return peftkern.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "k_proj"], **settings)


def prefix(task, P=3):
    return peftkern.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)


def prompt(task, P=3):
    return peftkern.PromptTuningConfig(task_type=task, num_virtual_tokens=P)


KINDS = {"lora": lora, "prefix": prefix, "prompt": prompt}
BLOCKS = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_and_heads(kind):
    """Some threads name an adapter for each row, others use the active one, with trained heads."""
    config = KINDS[kind]
    model = peftkern.get_peft_model(make("llama", "SEQ_CLS", torch.float64), config("SEQ_CLS"))
    for name in ("a", "b"):
        model.add_adapter(name, config("SEQ_CLS"))
    randomize(model)
    batch = inputs("llama", "SEQ_CLS")
    names = [["a", "b", "default"], ["b", "b", "a"], ["default", "a", "b"], None,
             ["a"] * 3, ["b", "default", "default"], None, ["b", "a", "a"]]  # fmt: skip
    if kind != "prompt":
        names[5] = ["b", "__base__", "default"]

    def call(given):
        with torch.no_grad():
            more = {} if given is None else {"adapter_names": given}
            return first(model(batch["input_ids"], batch["attention_mask"], **more))

    assert_as_alone(model.base_model, _block(model), [lambda g=g: call(g) for g in names])


def _block(model):
    return next(n for n, _ in model.base_model.named_modules() if n.endswith(BLOCKS["llama"]))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation(kind):
    """Some threads generate with the names of their rows, and one calls the base model."""
    model = peftkern.get_peft_model(make("llama", dtype=torch.float64), KINDS[kind]("CAUSAL_LM"))
    for name in ("a", "b"):
        model.add_adapter(name, KINDS[kind]("CAUSAL_LM"))
    randomize(model)
    ids = inputs("llama")["input_ids"]
    names = [["a", "b", "default"], ["b", "b", "a"], None, ["a"] * 3, "base",
             ["b", "default", "a"], ["default", "a", "a"], ["b", "a", "a"]]  # fmt: skip

    def call(given):
        settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
        settings["return_dict_in_generate"] = True
        called = model.base_model if given == "base" else model
        if isinstance(given, list):
            settings["adapter_names"] = given
        found = called.generate(input_ids=ids, **settings).logits
        return torch.stack(found).double()  # which transformers gives in fp32

    assert_as_alone(model.base_model, _block(model), [lambda g=g: call(g) for g in names])
    assert "prepare_inputs_for_generation" not in model.base_model.__dict__


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefixes_of_different_lengths(family):
    """An adapter's hooks serve all lengths: they are not put on anew under another thread."""
    model = peftkern.get_peft_model(make(family, dtype=torch.float64), prefix("CAUSAL_LM", 3))
    for name, P in (("long", 6), ("a", 3)):
        model.add_adapter(name, prefix("CAUSAL_LM", P))
    randomize(model)
    ids = inputs(family)["input_ids"]
    names = [["long"] * 3, ["a", "default", "__base__"], None, ["long", "__base__", "long"],
             ["a"] * 3, ["__base__"] * 3, ["default"] * 3, ["long"] * 3]  # fmt: skip

    @torch.no_grad()
    def call(given):
        return first(model(ids) if given is None else model(ids, adapter_names=given))

    assert_as_alone(model.base_model, BLOCKS[family], [lambda g=g: call(g) for g in names])


def test_groups_with_gradients():
    """Each thread's set is its own: nobody fetches, or gives up, another thread's outputs."""
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = randomize(peftkern.get_peft_model(make("llama", dtype=torch.float64), config))
    batches = [inputs("llama", batch=1 + i % 3, length=4 + i)["input_ids"] for i in range(THREADS)]
    weights = [p for p in model.parameters() if p.requires_grad]

    def call(ids):
        out = model(ids, labels=ids)
        grads = torch.autograd.grad(out.loss, weights)
        return torch.cat([out.logits.detach().flatten(), *(g.flatten() for g in grads)])

    calls = [lambda ids=ids: call(ids) for ids in batches]
    # they meet when each thread's q has computed k's output as well
    assert_as_alone(model.base_model, _block(model) + ".self_attn.k_proj", calls)
    assert not any(m._group.broken for m in model.modules() if groups._group_of(m) is not None)


def test_one_object_of_names_in_all_threads():
    model = peftkern.get_peft_model(make("llama", dtype=torch.float64), lora("CAUSAL_LM"))
    model.add_adapter("a", lora("CAUSAL_LM"))
    randomize(model)
    ids = inputs("llama")["input_ids"]
    names = AdapterNames(["a", "__base__", "default"])
    batches = [torch.roll(ids, i, -1) for i in range(THREADS)]

    @torch.no_grad()
    def call(ids):
        return first(model(ids, adapter_names=names))

    calls = [lambda ids=ids: call(ids) for ids in batches]
    assert_as_alone(model.base_model, _block(model), calls)
