"""MLPs that train as one operation: copies, adapters that come and go, patches, formulas."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftkern
from benchmarks.gpu import blocks as blocks_of_gpu
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.tuners.lora import mlp as module
from peftkern.tuners.lora.mlp_formula import Formula, formula_of
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.mlps import MLP, SAYS, adapted, mlps, words
from tests.models import build
from tests.tiny import fill, inputs, step

# ------------------------------------------------------------------------------ life


def test_modules_get_their_own_class_again():
    base = build("llama")
    before = {name: type(m) for name, m in base.named_modules()}
    config = peftkern.LoraConfig(r=2, target_modules=MLP)
    for leave in ("unload", "merge_and_unload"):
        model = peftkern.get_peft_model(base, config)
        assert len(mlps(base)) == 2
        assert isinstance(mlps(base)[0], before["model.layers.0.mlp"])
        assert type(mlps(base)[0]).__name__ == before["model.layers.0.mlp"].__name__
        base = getattr(model, leave)()
        assert {name: type(m) for name, m in base.named_modules()} == before
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=2, target_modules=["q_proj"]))
    assert mlps(base) == []
    with pytest.raises(ValueError):
        model.add_adapter("bad", peftkern.LoraConfig(r=2, target_modules=[*MLP, "act_fn"]))
    assert mlps(base) == []
    model.add_adapter("good", config)
    assert len(mlps(base)) == 2


def test_adapters_come_and_go(blocks):
    ours, theirs = adapted(targets=["q_proj"])
    batch = inputs("llama")
    for model, library in ((ours, peftkern), (theirs, peft)):
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=MLP))
        fill(model)
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert blocks == []  # the active adapter has nothing there
    for model in (ours, theirs):
        model.set_adapter("other")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 2
    found = []
    for model in (ours, theirs):
        with model.disable_adapter():
            found.append(model(**batch).logits)
    assert_same_number(*found)
    for model in (ours, theirs):
        model.merge_adapter()
        model.unmerge_adapter()
        model.get_base_model().model.layers[0].mlp.up_proj.scaling["other"] = 1.5
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 4
    for model in (ours, theirs):
        model.set_adapter("default")
        model.delete_adapter("other")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 4


def test_only_trained_adapters_get_gradients(blocks):
    ours, theirs = adapted(targets=MLP)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "up_proj.lora_A" in name or "down_proj.lora_B" in name:
                parameter.requires_grad_(False)
    batch = inputs("llama")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_hf_pefts_own_models(blocks, family, dropout):
    _, theirs = adapted(family, dropout=dropout)
    before = {name: type(m) for name, m in theirs.named_modules()}
    batch = inputs(family)
    want = step(theirs, batch)
    assert peftkern.fuse(theirs) is theirs
    assert_same_number(step(theirs, batch), want)
    assert len(blocks) == 2 and all(SAYS in w for w in words(theirs))
    peftkern.unfuse(theirs)
    assert {name: type(m) for name, m in theirs.named_modules()} == before
    peftkern.fuse(theirs)
    exact = theirs(**batch).logits if not dropout else None
    base = theirs.merge_and_unload()  # by HF PEFT
    if exact is not None:
        assert_same_number(base(**batch).logits, exact)
    base.requires_grad_(True)
    step(base, batch)
    assert mlps(base) == [] and len(blocks) == (4 if exact is not None else 2)


def test_copies_and_pickles(blocks):
    ours, _ = adapted(dropout=0.2)
    batch = inputs("llama")
    want = step(ours, batch)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        blocks.clear()
        assert len(mlps(other)) == 2 and mlps(other)[0] is not mlps(ours)[0]
        assert_same_number(step(other, batch), want)
        assert len(blocks) == 2
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert_same_number(step(ours, batch), want)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class MadeWithArguments(Gated):
    def __new__(cls, *args):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (1,)


def remade(cls, state):
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


class Remade(Gated):
    def __reduce__(self):
        return remade, (type(self), dict(self.__dict__))


class Final(Gated):
    def __init_subclass__(cls):
        raise TypeError("there are no subclasses")


class NeedsMore(type):
    def __new__(mcls, name, bases, members, more):
        return super().__new__(mcls, name, bases, members)

    def __init__(cls, name, bases, members, more):
        super().__init__(name, bases, members)


class Asking(Gated, metaclass=NeedsMore, more=1):
    pass


@pytest.mark.parametrize("cls", [Gated, MadeWithArguments, Remade, Final, Asking])
def test_classes_that_are_made_in_other_ways(blocks, cls, caplog, monkeypatch):
    monkeypatch.setattr("peftkern.ops.notes._said", set())
    torch.manual_seed(0)
    base = nn.Sequential(cls()).double()
    lora = {"r": 2, "target_modules": ["gate", "up", "down"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora))
    with caplog.at_level("INFO", "peftkern"):
        ours = peftkern.get_peft_model(base, peftkern.LoraConfig(**lora))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)

    def run(model):
        model.zero_grad()
        (y := model(x)).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), **grads}

    want = run(theirs)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(model.get_base_model()[0], cls)
        assert_same_number(run(model), want)
    refused = cls in (Final, Asking)
    assert len(blocks) == {Remade: 1, Final: 0, Asking: 0}.get(cls, 3)
    assert ("has a metaclass or __init_subclass__" in caplog.text) == refused


def test_replicas_use_their_own_weights():
    """``nn.DataParallel`` copies the attributes of modules into replicas."""
    ours, _ = adapted(targets=MLP)
    mlp = mlps(ours)[0]
    replica = mlp._replicate_for_data_parallel()
    for name, child in mlp._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.zero_()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert not replica(x).any() and mlp(x).any()


def test_compiled_models_have_the_separate_operations(blocks):
    ours, theirs = adapted()
    batch = inputs("llama")
    want = step(theirs, batch)
    torch._dynamo.reset()
    compiled = torch.compile(ours.get_base_model(), fullgraph=True, backend="aot_eager")
    out = compiled(**batch)
    out.loss.backward()
    assert_same_number(out.logits.detach(), want["output"])
    trained = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert_same_number(trained, {n: want[n] for n in trained})
    assert blocks == [] and len(trained) == len(want) - 2


# ------------------------------------------------------------------------------ formulas


def _class(text):
    import linecache

    name = f"<mlp {abs(hash(text))}>"
    lines = ["class M:", *("    " + line for line in text.splitlines())]
    linecache.cache[name] = (len(text), None, [line + "\n" for line in lines], name)
    space: dict[str, object] = {}
    exec(compile("\n".join(lines), name, "exec"), space)
    return space["M"]


GATED = Formula("gate", "up", "down", "act")
TEXTS = {
    "def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x))": GATED,
    'def forward(self, h):\n    """Words."""\n    a = self.act(self.gate(h))\n'
    "    b = self.up(h)\n    return self.drop(self.down(b * a))": GATED._replace(then="drop"),
    "def forward(self, x):\n    y = self.both(x)\n    a, b = y.chunk(2, dim=-1)\n"
    "    return self.down(b * self.act(a))": Formula("both", None, "down", "act", True),
    "def forward(self, x):\n    x = self.one(x)\n    x = self.act(x)\n    x = self.two(x)\n"
    "    return self.drop(x)": Formula("one", None, "two", "act", False, "drop"),
    # up draws its mask first
    "def forward(self, x):\n    return self.down(self.up(x) * self.act(self.gate(x)))": None,
    # the activation is on the second half
    "def forward(self, x):\n    a, b = self.both(x).chunk(2, dim=-1)\n"
    "    return self.down(a * self.act(b))": None,
    # another operation, call, statement or argument
    "def forward(self, x):\n    return self.down(self.act(self.gate(x)) + self.up(x))": None,
    "def forward(self, x):\n    return x + self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x), 2)": None,
    "def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x * x))": None,
    "def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.gate(x))": None,
    "def forward(self, x):\n    self.seen(x)\n"
    "    return self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x):\n    y = self.seen(x)\n"
    "    return self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x):\n    if self.flag:\n        x = x * x\n"
    "    return self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x, scale=1):\n"
    "    return self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x, *more):\n    return self.down(self.act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x):\n    return self.down(act(self.gate(x)) * self.up(x))": None,
    "def forward(self, x):\n    return self.down(self.gate(x))": None,
    "def forward(self, x):\n    return x": None,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_formulas_are_read_from_the_text(text):
    assert formula_of(_class(text)) == TEXTS[text]


def test_the_mlp_that_gpu_benchmarks_measure_has_a_formula():
    found = formula_of(blocks_of_gpu.Gated)
    assert found == Formula("gate_proj", "up_proj", "down_proj", "act_fn")


def test_only_the_forward_that_was_read_is_replaced(blocks):
    mlp = type(build("llama").model.layers[0].mlp)

    class Scaled(mlp):
        def forward(self, x):
            return super().forward(x) * 2

    class Same(mlp):
        pass

    for cls, count in ((Scaled, 0), (Same, 2)):
        base = build("llama")
        for layer in base.model.layers:
            layer.mlp.__class__ = cls
        model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=2, target_modules=MLP))
        step(model.train(), inputs("llama"))
        assert len(blocks) == count == len(mlps(model)), cls
        blocks.clear()


def test_a_class_that_is_patched_later_is_seen(blocks, monkeypatch):
    ours, theirs = adapted()
    cls = type(mlps(ours)[0]).peftkern_mlp_of
    monkeypatch.setattr(
        cls, "forward", lambda self, x: self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))
    )
    batch = inputs("llama")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert blocks == [] and all("not one operation" in w for w in words(ours))


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_activation_that_is_patched_later_is_seen(blocks, monkeypatch, wrapped):
    ours, theirs = adapted()
    batch = inputs("llama")
    step(ours, batch)
    blocks.clear()
    cls = type(ours.get_base_model().model.layers[0].mlp.act_fn)

    def tanh(self, x):
        return x.tanh()

    monkeypatch.setattr(cls, "forward", functools.wraps(cls.forward)(tanh) if wrapped else tanh)
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert blocks == []
    monkeypatch.undo()
    monkeypatch.setattr(module, "lora_mlp", lambda x, *a: blocks.append(a[3]) or lora_mlp(x, *a))
    step(ours, batch)
    assert blocks == ["silu"] * 2


@pytest.mark.parametrize("name", MLP)
def test_one_adapter_in_another_dtype(blocks, name):
    ours, theirs = adapted(targets=MLP)
    for model in (ours, theirs):
        for part in ("lora_A", "lora_B"):
            getattr(getattr(model.get_base_model().model.layers[0].mlp, name), part).float()
    batch = inputs("llama")
    mine, want = step(ours, batch), step(theirs, batch)
    assert len(blocks) == 2
    exact = step(copy.deepcopy(theirs).double(), batch)
    assert {n: g.dtype for n, g in mine.items()} == {n: g.dtype for n, g in want.items()}
    assert_as_good_as_torch(mine, want, exact)


def test_keywords_run_the_original_forward(blocks):
    ours, _ = adapted(targets=MLP)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    mlp = mlps(ours)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_number(mlp(x=x).detach(), mlp(x).detach())
    assert len(blocks) == 1
