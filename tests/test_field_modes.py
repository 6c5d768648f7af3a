"""Training and evaluation mode: adapters always follow the mode that the model reports."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkern
from tests.closeness import assert_same_number, differ
from tests.tiny import fill, first, inputs, make

# HF PEFT asks for it in every model
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class _Net(nn.Module):
    """A layer of each kind that LoRA has, and dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.own_dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.linear(self.own_dropout(self.attention(x, x, x)[0]))


IDS = torch.arange(8).view(2, 4)
TARGETS = ["embedding", "conv", "attention", "linear"]


def _config(library: Any, **settings: Any) -> Any:
    return library.LoraConfig(
        **{"r": 2, "target_modules": TARGETS, "lora_dropout": 0.5, **settings}
    )


def _seeded(model: Any, ids: Tensor = IDS) -> Tensor:
    torch.manual_seed(7)
    return model(ids)


def _drops(model: nn.Module) -> bool:
    return differ(model(IDS), model(IDS))


def _both(base: nn.Module, **settings: Any) -> tuple[Any, Any]:
    models = []
    for library in (peftkern, peft):
        model = library.get_peft_model(copy.deepcopy(base), _config(library, **settings))
        fill(model)
        models.append(model)
    return models[0], models[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": ["conv", "linear"], "use_dora": True}, {"target_modules": ["linear"]}],
)
def test_a_new_model_trains_with_its_dropout_whatever_the_base_does(
    settings: Any, training: bool
) -> None:
    ours, theirs = _both(_Net().double().train(training), **settings)
    assert ours.training and theirs.training and _drops(ours)
    assert ours.base_model.model.own_dropout.training is training
    assert_same_number(_seeded(ours), _seeded(theirs))
    modes = {name: m.training for name, m in theirs.named_modules()}
    assert all(modes[name] == m.training for name, m in ours.named_modules())
    ours.eval(), theirs.eval()
    assert not _drops(ours)
    assert_same_number(ours(IDS), theirs(IDS))


@pytest.mark.parametrize("base_trains", [False, True])
def test_a_further_adapter_is_in_the_mode_of_the_model(base_trains: bool) -> None:
    more = {"target_modules": ["linear", "conv"]}
    model = peftkern.get_peft_model(
        _Net().double().train(base_trains),
        _config(peftkern, target_modules=["embedding", "linear"]),
    )
    model.add_adapter("b", _config(peftkern, **more))
    model.set_adapter("b")
    fill(model)
    assert model.training and _drops(model)
    model.eval()
    model.add_adapter("c", _config(peftkern))  # in HF PEFT its dropout is on until the next eval()
    model.set_adapter("c")
    fill(model)
    assert not any(m.training for m in model.modules()) and not _drops(model)
    model.train()
    assert _drops(model)


def test_loaded_adapters_are_in_the_mode_of_the_model(tmp_path: Any) -> None:
    saved = peftkern.get_peft_model(_Net().double(), _config(peftkern))
    fill(saved)
    saved.save_pretrained(tmp_path)

    def load(**how: Any) -> Any:
        return peftkern.PeftModel.from_pretrained(_Net().double().eval(), tmp_path, **how)

    model = load(is_trainable=True)
    assert model.training and _drops(model)
    model.eval()
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    model.set_adapter("trained")
    assert not model.training and not _drops(model)
    model = load()
    assert not model.training and not _drops(model)
    model.load_adapter(tmp_path, "more")
    model.set_adapter("more")
    assert not model.training and not _drops(model)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_layers_alone_keeps_its_mode(training: bool) -> None:
    """It has no other mode than its own, and HF PEFT's dropout is on in evaluation."""
    base = _Net().double().train(training)
    model = peftkern.inject_adapter_in_model(_config(peftkern), base)
    fill(model)
    assert all(m.training is training for m in model.modules())
    assert _drops(model) is training


def test_training_by_hand_takes_the_steps_of_hf_peft() -> None:
    """A loop without train(), on a model that was loaded for evaluation."""
    ours, theirs = _both(
        make("llama", "CAUSAL_LM", torch.float64).eval(),
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    batch = inputs("llama")
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.eval()
    assert_same_number(first(ours(**batch)), first(theirs(**batch)))
