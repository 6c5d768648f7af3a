"""``fuse``: the fused forward in HF PEFT's own models, with HF PEFT's numbers, state and API."""

from __future__ import annotations

import copy
import logging
import pickle

import peft
import pytest
import torch
from packaging.version import Version
from peft.tuners.lora import Linear as HFLinear
from torch import nn

import peftkern
from peftkern.tuners.lora import group as groups
from peftkern.tuners.lora import hf_layer
from peftkern.tuners.lora.hf_layer import FusedLinear
from peftkern.tuners.lora.mlp import release_blocks
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.needs import needs
from tests.plain_reference import TRANSFORMERS
from tests.tiny import fill, first, inputs, make, step

ALL = "all-linear"
# which HF PEFT says
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")
    for said in (
        "fan_in_fan_out is set to False but",
        "Adapter w was active which is now deleted",
        "`lora_bias=True` was passed but the targeted layer of type Linear has no bias",
        "Already unmerged. Nothing to do",
    )
]


def hf_model(family="llama", task="CAUSAL_LM", dtype=torch.float64, base=None, **lora):
    lora = {"r": 4, "lora_alpha": 8, **lora}
    base = make(family, task, dtype) if base is None else base
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, **lora))
    fill(model)
    return model


def both(*args, **kwargs):
    """(fused, as HF PEFT made it)."""
    plain = hf_model(*args, **kwargs)
    return peftkern.fuse(copy.deepcopy(plain)), plain


def fused_layers(model):
    return [row.name for row in peftkern.explain(model) if row.fused]


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, HFLinear)]


def assert_equal_outputs(fused, plain, batch):
    with torch.no_grad():
        assert_same_number(first(fused(**batch)), first(plain(**batch)))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("family", "task", "lora"),
    [
        ("llama", "CAUSAL_LM", {"target_modules": ALL, "lora_dropout": 0.1}),
        ("gpt2", "CAUSAL_LM", {"lora_dropout": 0.1}),  # Conv1D
        ("t5", "SEQ_2_SEQ_LM", {"target_modules": ALL, "use_rslora": True}),
        ("bert", "SEQ_CLS", {"target_modules": ALL}),  # and a head that trains in full
    ],
)
def test_loss_and_gradients(family, task, lora):
    fused, plain = both(family, task, **lora)
    assert fused_layers(fused) and not fused_layers(plain)
    for model in (fused, plain):
        model.train()
    batch = inputs(family, task)
    found = step(fused, batch)
    assert_same_number(found, step(plain, batch))
    assert len(found) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_adapters_are_as_good_as_pefts(dtype):
    fused, plain = both(dtype=dtype, target_modules=ALL)
    assert len(fused_layers(fused)) == 14
    batch = inputs("llama")
    exact = step(copy.deepcopy(plain).double(), batch)
    assert_as_good_as_torch(step(fused, batch), step(plain, batch), exact)


# ---------------------------------------------------------------- it is still HF PEFT's


def state_of(model):
    return {
        name: (type(m), dict(m.__dict__), list(m._forward_pre_hooks.values()))
        for name, m in model.named_modules()
    }


def test_nothing_but_the_class_changes_and_unfuse_takes_that_back():
    model = hf_model(target_modules=ALL)
    before, keys = state_of(model), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    assert peftkern.fuse(model) is model and peftkern.fuse(model) is model
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert len(layers_of(model)) == 14
    for layer in layers_of(model):
        assert type(layer) is FusedLinear and isinstance(layer, peft.tuners.lora.LoraLayer)
        assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert model.get_model_status().num_adapter_layers == 14
    model(**inputs("llama")).loss.backward()  # plans are made
    model.zero_grad()
    assert peftkern.unfuse(model) is model and peftkern.unfuse(model) is model
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (cls, state, hooks) in after.items():
        assert (cls, hooks) == (before[name][0], before[name][2]), name
        assert state.keys() == before[name][1].keys(), name
    assert [id(p) for p in model.parameters()] == parameters


def test_an_optimizer_made_before_goes_on():
    fused, plain = both(target_modules=ALL)
    peftkern.unfuse(fused)
    batch = inputs("llama")
    trained = []
    for model in (fused, plain):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for number in range(4):
            if model is fused and number == 1:
                peftkern.fuse(model)
            if model is fused and number == 3:
                peftkern.unfuse(model)
            model(**batch).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(peft.get_peft_model_state_dict(model))
    assert_same_number(*trained)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, tmp_path):
    fused, plain = both(target_modules=ALL)
    batch = inputs("llama")
    fused(**batch).loss.backward()
    fused.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(fused_layers(twin)) == 14
    assert all(layer._plan is None for layer in layers_of(twin))
    with torch.no_grad():  # the copy's own weights, through its own plans and groups
        for parameter in fused.parameters():
            parameter.zero_()
    assert_same_number(step(twin, batch), step(plain, batch))
    assert not fused_layers(peftkern.unfuse(twin)) and not twin._forward_pre_hooks
    assert len(fused_layers(fused)) == 14


# ---------------------------------------------------------------- adapters, by HF PEFT's API


def _weighted(model):
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "w", combination_type="cat")
    model.set_adapter("w")


def _scaled(model):
    for layer in layers_of(model):
        layer.set_scale("b", 3.0)


def _loaded(model):
    state = peft.get_peft_model_state_dict(model, adapter_name="b")
    peft.set_peft_model_state_dict(model, {k: v * 1.5 for k, v in state.items()}, "b")


def _listed(model):
    """A list that the caller keeps, and changes afterwards."""
    names = ["b"]
    model.base_model.set_adapter(names)
    model(**inputs("llama"))
    names[:] = ["default"]


def _replaced(model):
    for layer in layers_of(model):
        linear = layer.lora_A["default"]
        linear.weight = nn.Parameter(linear.weight.detach() * 2)


STEPS = {  # what is done, and how many of the four layers run fused afterwards
    "add": (lambda m: m.add_adapter("b", peft.LoraConfig(r=2, init_lora_weights=False)), 4),
    "switch": (lambda m: m.set_adapter("b"), 4),
    "scale": (_scaled, 4),
    "load": (_loaded, 4),
    "merge": (lambda m: m.merge_adapter(), 0),
    "unmerge": (lambda m: m.unmerge_adapter(), 4),
    "disable": (lambda m: m.base_model.disable_adapter_layers(), 0),
    "enable": (lambda m: m.base_model.enable_adapter_layers(), 4),
    "two": (lambda m: m.base_model.set_adapter(["default", "b"]), 0),
    "list": (_listed, 4),
    "replace": (_replaced, 4),
    "weighted": (_weighted, 4),
    "delete": (lambda m: m.delete_adapter("w"), 4),
    "dora": (lambda m: m.add_adapter("d", peft.LoraConfig(r=2, use_dora=True)), 4),
    "to dora": (lambda m: m.set_adapter("d"), 0),
    "back": (lambda m: m.set_adapter("b"), 4),
    "partly": (
        lambda m: m.add_adapter("q", peft.LoraConfig(target_modules=["q_proj"], r=3)),
        4,
    ),
    "to partly": (lambda m: m.set_adapter("q"), 2),
}


def test_what_peft_does_to_adapters():
    fused, plain = both()
    batch = inputs("llama")
    outputs = []
    for name, (change, count) in STEPS.items():
        for model in (fused, plain):
            torch.manual_seed(7)
            change(model)
            fill(model, seed=len(name)) if name in ("add", "dora", "partly") else None
        assert len(fused_layers(fused)) == count, name
        for layer in layers_of(fused):  # what is said and what is done
            declined = layer.fused_call(torch.ones(1, layer.in_features).double()) is None
            assert declined == (layer.decline_reason() is not None), name
        assert_equal_outputs(fused, plain, batch)
        with torch.no_grad():
            outputs.append(first(fused(**batch)))
        flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (fused, plain)]
        assert flags[0] == flags[1], name
    same = [a for a, b in zip(outputs, outputs[1:], strict=False) if not differ(a, b)]
    assert len(same) < 6  # adding does nothing, merging neither; the others must be seen
    with fused.disable_adapter(), plain.disable_adapter():
        assert_equal_outputs(fused, plain, batch)
    merged = [m.merge_and_unload() for m in (fused, plain)]
    assert not [m for m in merged[0].modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert_equal_outputs(*merged, batch)


def test_layers_that_are_added_later_are_named_and_fused_by_the_next_call():
    fused, plain = both()
    late = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    for model in (fused, plain):
        torch.manual_seed(1)
        model.add_adapter("late", late)
        model.set_adapter("late")
    rows = {row.name: row for row in peftkern.explain(fused) if "k_proj" in row.name}
    assert len(rows) == 2 and all("peftkern.fuse" in row.reason for row in rows.values())
    assert_equal_outputs(fused, plain, inputs("llama"))
    peftkern.fuse(fused)
    assert len([n for n in fused_layers(fused) if "k_proj" in n]) == 2
    assert "trains as one operation with k_proj" in str(peftkern.explain(fused))
    assert_equal_outputs(fused, plain, inputs("llama"))


def test_a_model_with_injected_layers_and_one_of_transformers():
    if TRANSFORMERS >= Version("5.24"):
        needs("peft>=0.22", "transformers' own add_adapter asks for it since 5.24")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    injected = peft.inject_adapter_in_model(config, make("llama", dtype=torch.float64))
    of_transformers = make("llama", dtype=torch.float64)
    of_transformers.add_adapter(config)
    for plain in (injected, of_transformers):
        fill(plain)
        fused = peftkern.fuse(copy.deepcopy(plain))
        assert len(fused_layers(fused)) == 4
        assert_equal_outputs(fused, plain, inputs("llama"))
    fused.disable_adapters()
    of_transformers.disable_adapters()
    assert_equal_outputs(fused, of_transformers, inputs("llama"))


# ---------------------------------------------------------------- groups


class Attention(nn.Module):
    """Its keys come from another tensor than its queries and values."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x * 2) + self.v_proj(x)


def test_a_set_with_different_inputs_is_left_apart_from_the_next_forward_on():
    torch.manual_seed(0)
    fused, plain = both(base=Attention().double(), task=None, target_modules=ALL)
    group = layers_of(fused)[0]._group
    for off in (False, True, True):
        x = torch.randn(3, 8, dtype=torch.float64)
        loss = fused(x).square().sum()
        assert group.off == off
        loss.backward()
        plain(x).square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            assert_same_number(parameter.grad, wanted[name].grad, name)
    assert "inputs differ" in str(peftkern.explain(fused))


def test_projections_train_as_one(monkeypatch):
    sizes = []
    real = groups.lora_group
    monkeypatch.setattr(
        groups, "lora_group", lambda x, m, *rest: sizes.append(len(m)) or real(x, m, *rest)
    )
    fused, _ = both(target_modules=ALL)
    fused(**inputs("llama"))
    assert sizes == [3] * 2
    sizes.clear()
    release_blocks(fused, everywhere=True)  # gate and up are a group where the MLP is not one
    fused(**inputs("llama"))
    assert sizes == [3, 2] * 2


# ---------------------------------------------------------------- a name for each row


@pytest.fixture
def one_operation(monkeypatch):
    """Batches that ran as one operation, by the index of their names."""
    seen = []
    real = hf_layer.lora_mixed
    monkeypatch.setattr(
        hf_layer, "lora_mixed", lambda x, *call: seen.append(call[3]) or real(x, *call)
    )
    return seen


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"),
                                              ("bert", "SEQ_CLS")])  # fmt: skip
def test_adapter_names(family, task, one_operation):
    fused, plain = both(family, task)
    for model in (fused, plain):
        model.add_adapter("b", peft.LoraConfig(task_type=task, r=9))
        fill(model)
        model.eval()
    batch = inputs(family, task)
    for names in (["b", "__base__", "default"], ["b"] * 3, ["default", "b", "b"]):
        one_operation.clear()
        with torch.inference_mode():  # what is remembered of the names must not be bound to it
            fused(**batch, adapter_names=names)
        assert len(one_operation) == len(layers_of(fused)) > 2
        assert len({id(n) for n in one_operation}) == 1  # one index for all layers
        assert_equal_outputs(
            lambda names=names, **kw: fused(**kw, adapter_names=names),
            lambda names=names, **kw: plain(**kw, adapter_names=names),
            batch,
        )
        if "default" in names:  # the one that trains: gradients in evaluation
            fused(**batch, adapter_names=names).loss.backward()
            fused.zero_grad()
    if task != "SEQ_CLS":
        ids = batch["input_ids"]
        out = [
            m.generate(input_ids=ids, adapter_names=names, num_beams=2, max_new_tokens=4)
            for m in (fused, plain)
        ]
        assert torch.equal(*out)


def test_adapter_names_that_are_no_single_operation(one_operation):
    fused, plain = both()
    for model in (fused, plain):
        torch.manual_seed(2)
        model.add_adapter("biased", peft.LoraConfig(r=2, lora_bias=True, init_lora_weights=False))
        model.add_adapter("dora", peft.LoraConfig(r=2, use_dora=True))
        model.eval()
    batch = inputs("llama")
    assert_equal_outputs(
        lambda **kw: fused(**kw, adapter_names=["default", "biased", "biased"]),
        lambda **kw: plain(**kw, adapter_names=["default", "biased", "biased"]),
        batch,
    )
    errors = []
    for model in (fused, plain):
        for names in (["dora"] * 3, ["default"] * 2, ["nobody"] * 3):
            with pytest.raises(ValueError) as caught:
                model(**batch, adapter_names=names)
            errors.append(str(caught.value))
            for layer in model.modules():  # which HF PEFT leaves behind
                layer._forward_pre_hooks.clear()
    assert errors[:3] == errors[3:] and not one_operation


# ---------------------------------------------------------------- what keeps HF PEFT's forward


class Zoo(nn.Module):
    """One module of each kind that HF PEFT's LoRA knows, and one that no product is."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.image = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.plain = nn.Linear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.biased = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.image(self.words(ids).mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.biased(self.hooked(self.plain(x)))


def test_each_layer_that_is_not_fused_says_why():
    torch.manual_seed(0)
    targets = ["words", "image", "attention", "plain", "hooked", "biased"]
    plain = hf_model(
        base=Zoo().double(), task=None, target_modules=targets, lora_dropout=0.0
    ).eval()
    plain.add_adapter("bias", peft.LoraConfig(target_modules=["biased"], lora_bias=True))
    fused = peftkern.fuse(copy.deepcopy(plain))
    zoo = fused.base_model.model
    zoo.hooked.lora_A["default"].register_forward_hook(lambda *_: None)
    rows = {row.name.rpartition(".")[2]: row for row in peftkern.explain(fused)}
    assert rows["plain"].fused and rows["biased"].fused
    for name, words in {
        "words": "Embedding keeps its own forward",
        "image": "Conv1d keeps its own forward",
        "attention": "MultiheadAttention keeps its own forward",
        "hooked": "lora_A has hooks",
    }.items():
        assert not rows[name].fused and words in rows[name].reason, (name, rows[name].reason)
        assert rows[name].backend == "HF PEFT"
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert_same_number(fused(ids), plain(ids))
    for model in (fused, plain):
        model.set_adapter("bias")
        fill(model, "bias")
    rows = {row.name.rpartition(".")[2]: row for row in peftkern.explain(fused)}
    assert rows["biased"].reason == "lora_bias"
    assert_same_number(fused(ids), plain(ids))
    for layer in layers_of(fused):
        layer.scaling = {name: torch.tensor(value) for name, value in layer.scaling.items()}
    fused.set_adapter("default")
    plain.set_adapter("default")
    rows = {row.name.rpartition(".")[2]: row for row in peftkern.explain(fused)}
    assert "the scaling is a tensor" in rows["plain"].reason
    assert zoo.plain.fused_call(torch.ones(1, 8).double()) is None
    assert_same_number(fused(ids), plain(ids))


def test_the_reason_of_a_slow_call_is_logged_once(caplog):
    fused, _ = both()
    fused.add_adapter("d", peft.LoraConfig(r=2, use_dora=True))
    fused.set_adapter("d")
    with caplog.at_level(logging.INFO, "peftkern"):
        fused(**inputs("llama"))
        fused(**inputs("llama"))
    said = [r.getMessage() for r in caplog.records if "is not fused" in r.getMessage()]
    assert len(said) == 4 and all("Dora" in words for words in said)


class OwnLinear(HFLinear):
    """Somebody's subclass, which may compute what it likes."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) + 1


def test_subclasses_and_moved_state_are_left_alone():
    """A subclass is not HF PEFT's layer, and neither is a layer with its state in another place.

    For other layers, the names that fuse reads (``hf_layer._READ``) exist in the installed HF PEFT.
    """
    model = hf_model()
    q, v, other = layers_of(model)[:3]
    assert hf_layer.why_not(q) is None
    q.__class__ = OwnLinear
    v.__dict__["_active_state"] = v.__dict__.pop("_active_adapter")
    other.forward = other.forward
    peftkern.fuse(model)
    assert type(q) is OwnLinear and type(v) is HFLinear and type(other) is HFLinear
    assert len([m for m in layers_of(model) if type(m) is FusedLinear]) == 1
    reasons = [row.reason for row in peftkern.explain(model)[:3]]
    assert "OwnLinear keeps its own forward" in reasons[0]
    assert all("not where HF PEFT has it" in reason for reason in reasons[1:])


# ---------------------------------------------------------------- compiled


def test_compiled_in_one_graph():
    torch.manual_seed(0)
    fused, plain = both(base=Attention().double(), task=None, target_modules=ALL)
    for model in (fused, plain):
        model.add_adapter("b", peft.LoraConfig(r=2, target_modules=ALL))
        fill(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    try:
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        for names in (["b"], ["default", "b"]):
            for model in (fused, plain):
                model.base_model.set_adapter(names)
            grads = []
            for model in (compiled, plain):
                model.zero_grad()
                model(x).square().sum().backward()
                grads.append([p.grad for p in model.parameters() if p.grad is not None])
            assert len(grads[0]) == 6 * len(names)
            assert_same_number(*grads)
    finally:
        torch.compiler.reset()


# ---------------------------------------------------------------- errors


def test_models_that_cannot_be_fused():
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"],
                         feedforward_modules=[])  # fmt: skip
    for model, words in (
        (make("llama"), "LlamaForCausalLM has no adapters"),
        (peft.get_peft_model(make("llama"), prefix), r"PREFIX_TUNING \(load prompts with"),
        (peft.get_peft_model(make("llama"), ia3), "are IA3"),
        (nn.Linear(2, 2), "Linear has no adapters"),
    ):
        with pytest.raises(ValueError, match="fuse: `model` must hold LoRA layers.*" + words):
            peftkern.fuse(model)
    for function in (peftkern.fuse, peftkern.unfuse):
        with pytest.raises(TypeError, match="must be an nn.Module, got dict"):
            function({})


def test_peftkerns_own_models_are_fused_already():
    lora = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(task_type="CAUSAL_LM"))
    prompts = peftkern.get_peft_model(
        make("llama"), peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    for model in (lora, prompts):
        hooks = len(model._forward_pre_hooks)
        assert peftkern.fuse(model) is model and peftkern.unfuse(model) is model
        assert len(model._forward_pre_hooks) == hooks


def test_a_model_none_of_whose_layers_is_fused():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    model = peft.get_peft_model(make("llama"), config)
    with pytest.warns(UserWarning, match="none of 1 LoRA layers is fused: 1 times a .*Embedd"):
        peftkern.fuse(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("what", ["class", "forward"])
def test_unfuse_after_something_else_took_the_layer(what):
    fused, _ = both()
    layer = layers_of(fused)[-1]
    before = layer.__dict__.copy()
    if what == "class":
        layer.__class__ = type("Sharded", (FusedLinear,), {})
    else:
        layer.forward = layer.forward
    with pytest.raises(RuntimeError, match=f"v_proj' was given another {what}"):
        peftkern.unfuse(fused)
    assert len([m for m in layers_of(fused) if isinstance(m, FusedLinear)]) == 4
    layer.__class__ = FusedLinear
    layer.__dict__ = before
    assert not fused_layers(peftkern.unfuse(fused))
