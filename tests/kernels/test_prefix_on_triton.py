"""Ring 2 through the public layers: models with a prefix on ``PEFTKERN_BACKEND=triton``.

They are compared with the same models on torch. The operation is also tested alone, with the choice
that it reports.
"""

import copy
import logging

import pytest
import torch

import peftkern
from peftkern.ops import backend, notes, prefix_auto, prefix_kernel
from peftkern.ops import prefix_attention as operation
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.prefix_report import describe
from tests.closeness import assert_as_good_as_torch
from tests.kernels.racing import FakeClock, dispatcher
from tests.needs import merging_on_a_cpu
from tests.prefix_cases import SCALE, gradients
from tests.prefix_cases import inputs as tensors_of
from tests.prefix_models import alone, inputs
from tests.prompts import prompt_model
from tests.tiny import inputs as tiny_inputs


@pytest.fixture
def calls(monkeypatch):
    """The list of the operation's parts that ran on the kernels, in order."""
    found = []
    for name in ("forward", "backward"):
        real = getattr(prefix_kernel, name)
        monkeypatch.setattr(
            prefix_kernel, name, lambda *a, n=name, f=real: found.append(n) or f(*a)
        )
    return found


def batch_of(family, padding):
    """Two rows: every head of every row is an interpreted program."""
    return {name: t[:2] for name, t in inputs(family, padding).items()}


def step(pair, batch, **more):
    """Loss, logits of real tokens and the gradients of prefixes and of what else asks for one."""
    others = [p for p in pair.model.parameters() if p.requires_grad]
    prefixes = more.pop("prefixes", None) or pair.prefixes()
    with pair.injection.active(prefixes, **more):
        out = pair.model(**batch)
    mask = batch.get("attention_mask")
    logits = out.logits if mask is None or out.logits.dim() < 3 else out.logits[mask.bool()]
    grads = torch.autograd.grad(out.loss, [pair.weight, *others], allow_unused=True)
    return [out.loss.detach(), logits.detach(), *(g for g in grads if g is not None)]


def assert_as_good(ours, torchs, exact):
    exact = [t.double() for t in exact]  # the loss is fp32 in any model
    assert_as_good_as_torch(*(dict(enumerate(found)) for found in (ours, torchs, exact)))


def wide(pair):
    """The pair in float64."""
    found = alone(pair.family, dtype=torch.float64)
    found.model.load_state_dict(pair.model.state_dict())
    found.weight.data.copy_(pair.weight.data)
    for p, q in zip(found.model.parameters(), pair.model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return found


def leaves(tensors, dtype=torch.float64):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


CASES = [
    ("llama", None),  # grouped queries
    ("gemma2", "left"),  # a window and softcap
    ("gpt_oss", "left"),  # a window and sinks, which train here
    ("bert", "right"),  # bidirectional
]


@pytest.mark.long
@pytest.mark.parametrize(("family", "padding"), CASES)
def test_loss_and_gradients_are_those_on_torch(family, padding, calls):
    pair, batch = alone(family, dtype=torch.float32), batch_of(family, padding)
    for name, p in pair.model.named_parameters():
        p.requires_grad_(name.endswith(("sinks", "q_proj.weight")))
    with peftkern.use_backend("torch"):
        expected, exact = step(pair, batch), step(wide(pair), batch)
    assert not calls
    with peftkern.use_backend("triton"):
        assert_as_good(step(pair, batch), expected, exact)
    assert calls == ["forward"] * pair.layers + ["backward"] * pair.layers
    assert all(x.any() for x in expected[2:])


@pytest.mark.long
def test_a_prefix_for_each_row(calls, family="llama"):
    pair, batch = alone(family, dtype=torch.float32), batch_of(family, "left")
    rows = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    found = []
    for choice, one in (("triton", pair), ("torch", pair), ("torch", wide(pair))):
        prefixes = [(k * rows, v * rows) for k, v in one.prefixes()]
        with peftkern.use_backend(choice):
            no_prefix = torch.tensor([False, True])
            found.append(step(one, batch, prefixes=prefixes, no_prefix=no_prefix))
    assert_as_good(*found)
    assert calls == ["forward"] * pair.layers + ["backward"] * pair.layers


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_generation_is_that_on_torch(family, calls):
    """From beyond the window on; then with a static cache, whose offset is on the device."""
    pair, batch = alone(family, dtype=torch.float32), batch_of(family, "left")
    batch.pop("labels")
    settings = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
    found = []
    for choice in ("torch", "triton"):
        with peftkern.use_backend(choice), torch.no_grad(), pair.active():
            found.append(pair.model.generate(**batch, **settings))
    assert torch.equal(*found)
    assert len(calls) == 2 * pair.layers
    if family != "llama":
        return
    with peftkern.use_backend("triton"), torch.no_grad(), pair.active():
        static = pair.model.generate(
            **batch, **settings, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(static, found[0])
    assert len(calls) == 4 * pair.layers


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_prefix_tuned_model(reentrant, calls, monkeypatch):
    """From ``get_peft_model``, the environment choosing; under gradient checkpointing."""
    model, batch = (
        prompt_model(peftkern, "prefix", dtype=torch.float32).train(),
        tiny_inputs("llama", "CAUSAL_LM"),
    )
    batch = {name: t[:1] for name, t in batch.items()}
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.mul_(3.0)
    found = []
    for choice, dtype in (("torch", torch.float64), ("torch", None), ("triton", None)):
        monkeypatch.setenv("PEFTKERN_BACKEND", choice)
        monkeypatch.delattr(backend, "active", raising=False)
        one = model if dtype is None else copy.deepcopy(model).to(dtype)
        if choice == "triton":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = one(**batch).loss
        loss.backward()
        embedding = one.prompt_encoder["default"].embedding
        found.append([loss.detach().to(dtype), embedding.weight.grad.clone()])
        embedding.weight.grad = None
    monkeypatch.delattr(backend, "active")
    assert_as_good(*found[::-1])
    assert calls.count("backward") == 2
    assert calls.count("forward") == 4  # computed again
    with peftkern.use_backend("triton"):
        assert {r.backend for r in peftkern.explain(model)} == {"triton kernel"}
        assert all(r.fused for r in peftkern.explain(model))
        assert {r.reason for r in peftkern.explain(model.double())} == {
            "asked for: PEFTKERN_BACKEND=triton: dtype torch.float64: blocks of one softmax (long "
            "float32 queries) or the vendor's attention for each part"
        }


def test_what_the_kernel_does_not_take_says_why(caplog, calls, monkeypatch):
    merging_on_a_cpu()  # or there is another reason besides
    notes._said.clear()
    wide = tensors_of(1, 2, 2, 4, 4, 3, 80, dtype=torch.float32)
    double = tensors_of(1, 2, 2, 4, 4, 3, 8)
    with peftkern.use_backend("triton"), caplog.at_level(logging.INFO, "peftkern"):
        for tensors, reason in ((double, "float64"), (wide, "head dimension 80")):
            for _ in range(2):
                prefix_attention(*tensors, scale=SCALE, causal=True)
            assert "does not run on the Triton kernel" in caplog.messages[-1]
            assert reason in caplog.messages[-1]
        assert len(caplog.messages) == 2 and not calls
        with torch.no_grad():  # its forward spills nothing
            prefix_attention(*wide, scale=SCALE, causal=True)
        assert calls == ["forward"]
        narrow = tensors_of(1, 2, 2, 4, 4, 3, 8, dtype=torch.float32)
        prefix_attention(*narrow, scale=SCALE, causal=True, dropout=0.5)
    assert "dropout" in caplog.messages[-1] and calls == ["forward"]
    monkeypatch.setattr(prefix_kernel.INTERPRET, "value", False)
    assert "on cpu" in prefix_kernel.why_not(narrow[0], True)


def test_second_derivatives_with_softcap_and_sinks():
    tensors = tensors_of(2, 4, 2, 5, 5, 3, 8, dtype=torch.float32)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found, options = [], {"scale": SCALE, "causal": True, "softcap": 2.0}
    for choice, of in (
        ("triton", torch.float32),
        ("torch", torch.float32),
        ("torch", torch.float64),
    ):
        with peftkern.use_backend(choice):
            *qkv, sinks_ = given = leaves([*tensors, sinks], of)
            out = prefix_attention(*qkv, sinks=sinks_, **options)
            first = torch.autograd.grad(out.sin().sum(), given, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
            found.append([t.detach() for t in (*first, *second)])
    assert_as_good(*found)


# ---- auto: raced --------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", ["kernel", "torch"])
def test_auto_races_each_kind_of_call_once(fastest, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(prefix_auto, "_decisions", {})
    clock = FakeClock(fastest)
    options = {"scale": SCALE, "causal": True}
    with dispatcher(monkeypatch, tmp_path, clock):
        for T, races in ((8, 1), (7, 1), (9, 2)):
            tensors = tensors_of(1, 2, 1, T, T, 5, 8, dtype=torch.float32)
            with peftkern.use_backend("torch"):
                double = leaves(tensors)
                expected, exact = (
                    gradients(prefix_attention(*t, **options), t) for t in (tensors, double)
                )
            state = torch.get_rng_state()
            found = gradients(prefix_attention(*tensors, **options), tensors)
            assert_as_good(found, expected, exact)
            assert torch.equal(torch.get_rng_state(), state)
            assert clock.races == races
        calls.clear()
        prefix_attention(*tensors, **options).sum().backward()
        assert bool(calls) == (fastest == "kernel")
        with torch.no_grad():  # a kind of its own
            prefix_attention(*tensors, **options)
        assert clock.races == 3
        why = {why for _, why in prefix_auto._decisions.values()}
        assert len(why) == 1 and "raced in this process" in why.pop()
        fused, backend, reason = describe(tensors[0], 8)
        assert fused and backend == "kernel or torch"
        assert f"forward+backward B=1 T<=8 S<=8 P=5 {fastest} (raced" in reason
        assert f"forward B=1 T<=16 S<=16 P=5 {fastest} (raced" in reason
        assert "not called yet" in describe(tensors[0], 16)[2]


def test_auto_stays_with_torch_where_nothing_may_race(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(prefix_auto, "_decisions", {})
    tensors = tensors_of(2, 4, 2, 6, 6, 5, 8, dtype=torch.float32)
    rule = operation.Rule(SCALE, True, 0)

    def asked():
        return operation.why_not_kernel(*tensors, rule, False)

    with dispatcher(monkeypatch, tmp_path, FakeClock("kernel")) as clock:
        monkeypatch.setenv("PEFTKERN_RACE", "0")
        assert asked() == "PEFTKERN_RACE=0"
        monkeypatch.delenv("PEFTKERN_RACE")
        with prefix_auto._racing:
            assert "another thread" in asked()
        assert "another thread" in asked()  # and is not asked again
        prefix_auto._decisions.clear()
        monkeypatch.setattr(prefix_auto, "capturing", lambda x: True)
        assert "CUDA graph" in asked()
        prefix_auto._decisions.clear()
        monkeypatch.setattr(prefix_auto, "capturing", lambda x: False)
        broken = lambda *a: (_ for _ in ()).throw(RuntimeError("no resources"))  # noqa: E731
        with monkeypatch.context() as m:
            m.setattr(prefix_kernel, "forward", broken)
            assert "left out of a race: RuntimeError: no resources" in asked()
        prefix_auto._decisions.clear()
        assert not clock.races or clock.races == 1
        assert asked() is None
