"""What ``fuse(model, liger=True)`` asks of liger-kernel, by a stand-in that records it.

The stand-in computes nothing, so these are tests of the wiring alone. tests/kernels/test_liger.py
has the numbers, with liger-kernel itself.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import peftkern
from peftkern import liger
from peftkern.cli.errors import UserError
from peftkern.cli.settings import TrainSettings
from peftkern.cli.train import train
from peftkern.kernels import common
from peftkern.tuners.lora.hf_layer import FusedLinear
from tests.tiny import fill, inputs, make

LORA = {"r": 4, "target_modules": "all-linear"}


class StandIn(ModuleType):
    """liger-kernel with one function for Llama, which replaces what the real one replaces."""

    def __init__(self) -> None:
        super().__init__("liger_kernel.transformers.monkey_patch")
        self.calls: list[dict] = []
        self.fails = False
        self.fused_when_called: list[int] = []
        self.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": self.apply, "gpt2": self.apply}

    def apply(
        self,
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        layer_norm: bool = True,
        swiglu: bool = True,
        something_new: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        self.calls.append({k: v for k, v in locals().items() if k != "self"})
        assert model is not None
        self.fused_when_called.append(sum(isinstance(m, FusedLinear) for m in model.modules()))
        if rope:
            modeling_llama.apply_rotary_pos_emb = self.rotary
        if rms_norm:
            modeling_llama.LlamaRMSNorm = nn.Identity
            model.model.norm.forward = _foreign(lambda x: x)
        if self.fails:
            raise AttributeError("no such layer")
        if fused_linear_cross_entropy:
            model.forward = _foreign(_forward).__get__(model)

    @staticmethod
    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        raise AssertionError("the stand-in has no rope")


def _foreign(function):
    function.__module__ = "liger_kernel.stand_in"
    return function


def _forward(self, input_ids=None, labels=None, skip_logits=None, **kwargs):
    return skip_logits


@pytest.fixture
def standin(monkeypatch):
    made = StandIn()
    for name in ("liger_kernel", "liger_kernel.transformers"):
        package = ModuleType(name)
        package.__path__ = []
        package.monkey_patch = made
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    before = dict(vars(modeling_llama))
    yield made
    for name, value in before.items():
        setattr(modeling_llama, name, value)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(liger, "runs_on", lambda device_type: True)


def adapted(library=peftkern, task="CAUSAL_LM", family="llama", **settings):
    config = library.LoraConfig(task_type=task, **{**LORA, **settings})
    model = library.get_peft_model(make(family, task), config)
    fill(model)
    return model


def state(model):
    """What a failed call may not change."""
    modules = [(m, type(m), dict(m.__dict__)) for m in model.modules()]
    return modules, dict(vars(modeling_llama))


def assert_unchanged(model, before):
    modules, functions = before
    for module, cls, own in modules:
        assert type(module) is cls
        assert module.__dict__.keys() == own.keys()
        assert all(module.__dict__[name] is value for name, value in own.items())
    assert dict(vars(modeling_llama)) == functions


# ------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_the_switches_and_the_order(standin, on_a_gpu, library):
    model = adapted(library)
    rope, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    assert peftkern.fuse(model, liger=True) is model
    [call] = standin.calls
    assert call.pop("model") is model.get_base_model()
    assert {name for name, on in call.items() if on} == {
        *("rope", "rms_norm", "fused_linear_cross_entropy")
    }
    # adapters, then liger, then the fused forward of HF PEFT's layers
    assert standin.fused_when_called == [0]
    assert all(row.fused for row in peftkern.explain(model))
    # rope is for all models of the family, where liger runs; the classes are not replaced
    assert modeling_llama.apply_rotary_pos_emb is not rope
    assert modeling_llama.LlamaRMSNorm is norm
    peftkern.unfuse(model)
    assert modeling_llama.apply_rotary_pos_emb is rope
    assert "forward" not in model.get_base_model().__dict__


def test_without_it_liger_is_not_asked(standin, on_a_gpu):
    peftkern.fuse(adapted(), liger=False)
    peftkern.fuse(adapted(peft))
    assert standin.calls == []


@pytest.mark.parametrize(
    ("settings", "switch", "reason"),
    [
        ({"task": "SEQ_CLS"}, "fused_linear_cross_entropy", "has another loss"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            "rms_norm",
            "norm trains beside an adapter",
        ),
    ],
)
@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_what_would_be_wrong_is_left_out(standin, on_a_gpu, library, settings, switch, reason):
    model = peftkern.fuse(adapted(library, **settings), liger=True)
    [call] = standin.calls
    assert not call[switch] and call["rope"]
    assert reason in peftkern.explain(model).liger


def test_the_head_is_called_where_it_has_an_adapter(standin, on_a_gpu):
    model = peftkern.fuse(adapted(), liger=True)
    base, batch = model.get_base_model(), inputs("llama")
    assert base.forward(**batch) is None and base.forward(skip_logits=True) is True
    model.add_adapter("other", peftkern.LoraConfig(target_modules=["lm_head"]))
    assert base.forward(**batch) is False and base.forward(skip_logits=True) is False


def test_a_rope_of_liger_leaves_models_on_the_cpu_alone(standin, on_a_gpu, monkeypatch):
    other, batch = make("llama"), inputs("llama")
    expected = other(**batch).logits
    peftkern.fuse(adapted(), liger=True)
    with pytest.raises(AssertionError, match="no rope"):
        other(**batch)
    monkeypatch.setattr(liger, "runs_on", lambda device_type: device_type != "cpu")
    assert torch.equal(other(**batch).logits, expected)


# ------------------------------------------------------------------------------ bad input


def forget_liger(monkeypatch):
    """Make liger-kernel absent, also where other tests of this process have imported it."""
    for name in [n for n in sys.modules if n.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


def refused(model, error, match):
    before = state(model)
    with pytest.raises(error, match=match):
        peftkern.fuse(model, liger=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_without_liger_kernel(monkeypatch, library):
    forget_liger(monkeypatch)
    refused(
        adapted(library),
        ImportError,
        r'liger-kernel is not installed; pip install "peftkern\[liger\]"',
    )
    peftkern.fuse(adapted(library))


def test_an_import_of_liger_that_fails_says_what_is_missing(monkeypatch, standin):
    monkeypatch.setitem(sys.modules, standin.__name__, None)
    monkeypatch.delattr(sys.modules["liger_kernel.transformers"], "monkey_patch")
    with pytest.raises(ImportError):
        liger.patches()


@pytest.fixture
def compiled(monkeypatch):
    """Kernels are compiled; other tests of the same process may interpret them."""
    monkeypatch.setattr(common, "INTERPRET", SimpleNamespace(value=False))


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_a_model_on_the_cpu(standin, compiled, library):
    refused(adapted(library), ValueError, "must be on a GPU, and .*weight is on cpu; move it first")
    assert standin.calls == []


def test_other_models_are_refused(standin, on_a_gpu):
    gpt2 = adapted(family="gpt2", fan_in_fan_out=True)
    refused(gpt2, ValueError, "must be one of llama; got 'gpt2'")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    config = peftkern.LoraConfig(target_modules=["q_proj"])
    refused(peftkern.get_peft_model(Own(), config), ValueError, "one of transformers', got Own")
    refused(make("llama"), ValueError, "must hold LoRA layers of HF PEFT")
    assert standin.calls == []


def test_replaced_forwards_of_norms_are_refused(standin, on_a_gpu):
    model = adapted()
    norm = model.get_base_model().model.norm
    norm.forward = functools.partial(type(norm).forward, norm)
    refused(model, ValueError, "the forward of model.norm was replaced")
    assert standin.calls == []


@pytest.mark.parametrize("library", [peftkern, peft], ids=["ours", "HF PEFT's"])
def test_nothing_remains_of_what_liger_could_not_finish(standin, on_a_gpu, library):
    standin.fails = True
    refused(adapted(library), AttributeError, "no such layer")


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def settings(tmp_path):
    return TrainSettings(
        model=str(tmp_path), data=str(tmp_path), out=str(tmp_path / "out"), liger=True, cpu=True
    )


def test_train_without_liger_kernel(settings, monkeypatch):
    forget_liger(monkeypatch)
    with pytest.raises(UserError, match="^--liger: liger-kernel is not installed; pip install"):
        train(settings)


def test_train_on_the_cpu(settings, standin, compiled):
    with pytest.raises(UserError, match="^--liger: liger-kernel needs a GPU"):
        train(settings)


def test_the_option_is_in_the_help(capsys):
    app = importlib.import_module("peftkern.cli.app")
    assert app.run(["train", "--help"]) == 0
    assert "--liger" in capsys.readouterr().out
