"""Tests only for MonteCLoRA, against HF PEFT: the random numbers, and the loss."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.helpers import MontecloraTrainerMixin as Theirs
from peft.tuners.lora.monteclora import MontecloraSampler as TheirSampler
from torch import nn

import peftkern
from peftkern.helpers import MontecloraTrainerMixin
from peftkern.tuners.lora.monteclora import MontecloraSampler
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import gradients, inputs, make
from tests.variants import two_layers


def config(library, **settings):
    own = dict(
        num_samples=3, sample_scaler=0.1, use_entropy=True, buffer_size=2, kl_loss_weight=0.1
    )
    own.update(settings.pop("own", {}))
    settings = {"target_modules": ["0", "2"], "r": 4, "init_lora_weights": False, **settings}
    return library.LoraConfig(monteclora_config=library.MontecloraConfig(**own), **settings)


def models(dtype=None, own=(), **settings):
    return two_layers(lambda library: config(library, own=dict(own), **settings), dtype)


def tensors(ours, theirs):
    """The tensors that each library saves, first those of peftkern."""
    mine, other = peft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    have = peftkern.get_peft_model_state_dict(ours)
    assert have.keys() == mine.keys() == other.keys()
    assert sum("monteclora_sampler" in key for key in have) == 8
    return have, other


def step(model, x, seed):
    """Output, the variational loss, and all gradients of both."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y, loss = model(x), model._get_monteclora_loss()
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    total = y.square().mean() + loss
    grads = torch.autograd.grad(total, [x, *trained], allow_unused=True)
    return dict(enumerate([y.detach(), torch.as_tensor(loss, dtype=total.dtype), *grads]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [{}, {"use_entropy": False, "num_samples": 1}])
def test_training_and_evaluation(dtype, own, request):
    if dtype == torch.float64:
        request.getfixturevalue("in_double")
    pair = models(dtype, own, lora_dropout=0.3)
    exact = copy.deepcopy(pair[1]).double()  # with the numbers that are drawn in ``dtype``
    three = ((pair[0], dtype), (pair[1], dtype), (exact, torch.float64))

    def assert_agree(mine, other, right):
        assert {k: v is None for k, v in mine.items()} == {k: v is None for k, v in other.items()}
        mine, other, right = (
            {k: v for k, v in f.items() if v is not None} for f in (mine, other, right)
        )
        if dtype == torch.float64:
            assert_same_number(mine, other)
        else:
            assert_as_good_as_torch(mine, other, right)

    # also what is drawn for the second layer, after the first one's numbers
    have, want = tensors(*pair)
    assert all(torch.equal(have[key], want[key]) for key in want)
    outputs = []
    for seed in range(3):  # the third draws again
        x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
        found = [step(m.train(), x.to(t), seed // 3) for m, t in three]
        assert_agree(*found)
        if dtype == torch.float64:
            assert_same_number(*tensors(*pair))
        outputs.append(found[0][0])
    assert not torch.equal(outputs[0], outputs[1])
    assert not any(row.fused for row in peftkern.explain(pair[0]))
    found = [step(m.eval(), x.to(t), 0) for m, t in three]
    assert found[0][1].item() == found[1][1].item() == 0.0
    assert_agree(*found)
    assert all(row.fused for row in peftkern.explain(pair[0]))


@pytest.mark.usefixtures("in_double")
def test_the_sampler_itself():
    torch.manual_seed(0)
    mine = MontecloraSampler(6, 4, 3, device="cpu")
    torch.manual_seed(0)
    other = TheirSampler(6, 4, 3, device="cpu")
    assert_same_number(mine(), other())
    assert_same_number(mine.get_variational_loss(), other.get_variational_loss())
    # where HF PEFT's loss is infinite
    many = MontecloraSampler(6, 4, 128, device="cpu")
    assert many.get_variational_loss()[0].isfinite()
    assert not TheirSampler(6, 4, 128, device="cpu").get_variational_loss()[0].isfinite()


@pytest.mark.usefixtures("in_double")
def test_loss_of_named_adapters_and_copies():
    pair = models()
    for library, model in zip((peftkern, peft), pair, strict=True):
        torch.manual_seed(5)
        model.add_adapter("second", config(library, own={"num_samples": 2}))
        model.add_adapter("plain", library.LoraConfig(target_modules=["0"]))
        model.train()(torch.ones(2, 16))
    for names in (None, "second", ["default", "second"], "plain"):
        mine, other = (torch.as_tensor(m.base_model._get_monteclora_loss(names)) for m in pair)
        assert_same_number(mine, other)
    twin = copy.deepcopy(pair[0])  # HF PEFT's cannot be copied after a call
    twin.train()(torch.ones(2, 16))
    assert twin._get_monteclora_loss().isfinite()
    pair[0].delete_adapter("second")
    assert not any("second" in key for key in pair[0].state_dict())


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_compute_the_same_twice(reentrant):
    """HF PEFT's recomputation goes on to the next random numbers."""
    found = []
    for checkpointed in (False, True):
        base = make("llama", dtype=torch.float64)  # which seeds the generator when it is the first
        torch.manual_seed(1)
        own = config(peftkern, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peftkern.get_peft_model(base, own).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found.append([gradients(model, inputs("llama"))[1] for _ in range(2)])
    assert_same_number(found[1], found[0])


@pytest.mark.usefixtures("in_double")
def test_nan_is_said_and_leaves_the_weights_alone():
    ours, _ = models()
    x = torch.ones(2, 16)
    want = ours.eval()(x)
    with torch.no_grad():
        for i in (0, 2):
            sampler = ours.base_model.model[i].lora_monteclora_sampler["default"]
            sampler.expert_weights_prior.fill_(float("nan"))
    with pytest.warns(UserWarning, match="sampling produced NaNs, using base weights"):
        assert_same_number(ours.train()(x), want)


@pytest.mark.usefixtures("in_double")
def test_trainer_mixin():
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            y = model(inputs["x"])
            loss = y.square().mean()
            return (loss, y) if return_outputs else loss

    x, found, pair = torch.randn(4, 16), [], models(own={"buffer_size": 3})
    for mixin, model in zip((MontecloraTrainerMixin, Theirs), pair, strict=True):
        trainer = type("Both", (mixin, Trainer), {})()
        loss = trainer.compute_loss(model.train(), {"x": x})
        task = Trainer().compute_loss(model, {"x": x})
        both, y = trainer.compute_loss(model, {"x": x}, return_outputs=True)
        assert loss != task and y.shape == (4, 8)
        found.append([loss, task, both])
        plain = nn.Linear(16, 8)
        assert trainer.compute_loss(plain, {"x": x}) == Trainer().compute_loss(plain, {"x": x})
    assert_same_number(*found)
