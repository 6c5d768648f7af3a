"""Layers and tiny models of bitsandbytes on the CPU, and the same with dense weights."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.ops.bases.formats import read, reader_of
from tests.closeness import assert_as_good_as_torch


def bnb4(linear: nn.Linear, blocksize: int | None = None, **how: Any) -> Any:
    """A ``Linear4bit`` of a linear layer's weight."""
    import bitsandbytes

    N, K = linear.weight.shape
    made = bitsandbytes.nn.Linear4bit(K, N, bias=linear.bias is not None, **how)
    kept = {k: v for k, v in how.items() if k != "compute_dtype"}
    weight = linear.weight.detach().clone()
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, module=made, blocksize=blocksize, **kept
    )
    made.bias = linear.bias
    return made.to("cpu")


def bnb8(linear: nn.Linear, threshold: float = 0.0) -> Any:
    """A ``Linear8bitLt`` of a linear layer's weight."""
    import bitsandbytes

    N, K = linear.weight.shape
    bias = linear.bias is not None
    made = bitsandbytes.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=threshold)
    weight = linear.weight.detach().clone()
    made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu")


def quanto() -> Any:
    """optimum-quanto, unpacking by its Python function: its C++ takes most of a minute to build.

    Skips the test where quanto is not installed.
    """
    owner = pytest.importorskip("optimum.quanto")
    from optimum.quanto import library
    from optimum.quanto.library.extensions import cpp

    # the function is registered with torch and kept nowhere
    with (
        mock.patch.object(torch.library, "define"),
        mock.patch.object(torch.library, "impl", lambda *_: lambda function: function),
    ):
        own = runpy.run_path(str(Path(library.__file__).with_name("unpack.py")))
    cpp.ext._lib = SimpleNamespace(unpack=own["unpack"])
    return owner


def llama(make: Callable[..., Any] = bnb4, **how: Any) -> Any:
    """A Llama of two layers whose linear layers, but for the head, are quantised."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make(module, **how))
    return model.requires_grad_(False)


def copied(model: Any) -> Any:
    """A copy; weights of quanto, which torch cannot copy, are shared (they are frozen)."""
    shared = [p for p in model.parameters() if type(p).__module__.startswith("optimum.")]
    return copy.deepcopy(model, {id(p): p for p in shared})


def dense(model: Any) -> Any:
    """A float64 copy of a quantised model with the same numbers in plain linear layers."""
    model = copied(model)
    for name, module in list(model.named_modules()):
        if reader_of(module) is not None:
            found = read(module)
            assert not isinstance(found, str), found
            weight = found.packed.dense(torch.float32)
            linear = nn.Linear(*weight.T.shape, bias=found.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = found.bias
            model.set_submodule(name, linear)
    return model.double()


def adapted(base: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """(ours, HF PEFT's, HF PEFT's on dense weights in float64), with the same adapters."""
    more: Any = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    ours = peftkern.get_peft_model(copied(base), peftkern.LoraConfig(**more))
    theirs = peft.get_peft_model(copied(base), peft.LoraConfig(**more))
    exact = peft.get_peft_model(dense(base), peft.LoraConfig(**more)).double()
    held = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    for model in (theirs, exact):
        assert not model.load_state_dict(held, strict=False).unexpected_keys
    return ours, theirs, exact


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The logits and all gradients of a training step on the token ids x."""
    torch.manual_seed(3)
    out = model.train()(input_ids=x, labels=x)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def assert_steps_are_equal(
    ours: Any,
    theirs: Any,
    exact: Any,
    settings: dict[str, Any],
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> None:
    """A training step of ours is as near to the exact one as HF PEFT's.

    With dropout, of which float64 draws other masks, it is near HF PEFT's: within rtol and atol.
    """
    x = torch.randint(0, 64, (2, 9))
    if "lora_dropout" in settings:
        torch.testing.assert_close(step(ours, x), step(theirs, x), rtol=rtol, atol=atol)
    else:
        assert_as_good_as_torch(step(ours, x), step(theirs, x), step(exact, x))
