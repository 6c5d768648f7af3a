"""Helpers of the tests with liger-kernel: a training step, and what Triton's interpreter lacks."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import interpreter


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let liger's kernels run in Triton's interpreter, until the end of the test.

    They call methods of scalars, which the interpreter passes as Python's floats, and functions of
    libdevice, which it has not.
    """
    whole = interpreter._implicit_cvt

    def convert(arg: Any) -> Any:
        if isinstance(arg, float):
            handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return whole(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    norm = importlib.import_module("liger_kernel.ops.rms_norm")
    loss = importlib.import_module("liger_kernel.ops.cross_entropy")
    monkeypatch.setattr(norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(loss, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def numbers(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient, by parameter name."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {"loss": loss.detach().reshape(1), **grads}


def exactly(plain: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of a model without liger in float64, its loss too."""
    model = copy.deepcopy(plain).double()
    if hasattr(model.get_base_model(), "lm_head"):  # transformers computes this one in fp32
        model.get_base_model().loss_function = _loss
    found = numbers(model, batch)
    return {**found, "loss": found["loss"].to(torch.float64)}


def _loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
