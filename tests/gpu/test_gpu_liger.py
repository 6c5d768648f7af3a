"""liger-kernel beside adapters on the device: a training step, against the one without it."""

import copy

import pytest
import torch

import peftkern
from tests.closeness import assert_as_good_as_torch
from tests.gpu.ground import DEVICE, ON_CPU, backend
from tests.liger import exactly, interpret, numbers
from tests.tiny import fill, inputs, make

pytest.importorskip("liger_kernel", reason='not installed: pip install "peftkern[liger]"')


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_a_step_beside_liger(family, dtype, choice, monkeypatch):
    if ON_CPU:
        if dtype is torch.bfloat16:
            pytest.skip(
                "the interpreter takes bfloat16 for integers where a kernel does not cast it"
            )
        interpret(monkeypatch)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    plain = peftkern.get_peft_model(make(family, dtype=dtype), config)
    fill(plain)
    plain.to(DEVICE).train()
    batch = {name: tensor.to(DEVICE) for name, tensor in inputs(family).items()}
    with backend.use_backend(choice):
        expected, exact = numbers(plain, batch), exactly(plain, batch)
        model = peftkern.fuse(copy.deepcopy(plain), liger=True)
        found = numbers(model, batch)
    assert peftkern.explain(model).liger.endswith("fused linear cross-entropy")
    peftkern.unfuse(model)
    results = [{n: t.cpu() for n, t in each.items()} for each in (found, expected, exact)]
    assert_as_good_as_torch(*results)
