"""A Llama on quantised weights: a training step, bytes kept for the backward, and decoding.

HF PEFT runs on its own copy of the same layers, as bitsandbytes may pack weights anew in a call.
The bare column is the quantised model without adapters. Limits are those of docs/goals.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import peftkern

from .bench_train import BATCH, LENGTH, measure
from .llama import LIBRARIES, MEDIUM, build, equalise, lora_config, tokens
from .measure import BARE, OURS, PEFT, Work, allocated

PROMPT, NEW = 16, 12
STEP, KEPT, DECODE = 0.95, 0.7, 0.9


def nf4(linear: nn.Linear) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4",
        compute_dtype=torch.float32,
    )  # fmt: skip
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=made
    )
    return made.to("cpu")


def llm_int8(linear: nn.Linear) -> Any:
    """bitsandbytes' LLM.int8 with the threshold that transformers gives it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    made.weight = bitsandbytes.nn.Int8Params(
        linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
    )
    return made.to("cpu")


def int8(linear: nn.Linear) -> Any:
    """torchao's weight-only int8."""
    quantization = pytest.importorskip("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(version=2))
    return linear


def fp8(linear: nn.Linear) -> Any:
    """torchao's weight-only fp8."""
    quantization = pytest.importorskip("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(linear, quantization.Float8WeightOnlyConfig())
    return linear


MAKERS: dict[str, Callable[[nn.Linear], Any]] = {
    "NF4 (bitsandbytes)": nf4,
    "LLM.int8 (bitsandbytes)": llm_int8,
    "int8 (torchao)": int8,
    "fp8 (torchao)": fp8,
}

# attributes that transformers sets, and by which HF PEFT chooses its layers
FLAGS = {
    "NF4 (bitsandbytes)": "is_loaded_in_4bit",
    "LLM.int8 (bitsandbytes)": "is_loaded_in_8bit",
}


def models(kind: str, p: float) -> dict[str, Any]:
    """{provider: model} on the same quantised numbers, with equal adapters."""
    base: Any = build(MEDIUM)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, MAKERS[kind](module))
    if kind in FLAGS:
        setattr(base, FLAGS[kind], True)
    found: dict[str, Any] = {BARE: copy.deepcopy(base)}
    for name, library in LIBRARIES.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(copy.deepcopy(base), lora_config(library, p=p))
        found[name] = model
    equalise(found[PEFT], found[OURS])
    assert all(row.fused for row in peftkern.explain(found[OURS]))
    return found


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("kind", MAKERS)
def test_step(compare: Callable[..., Any], count: Callable[..., Any], kind: str, p: float) -> None:
    found = models(kind, p)
    row = f"{kind}, {MEDIUM}, dropout {p}"
    steps = measure(compare, found, MEDIUM, row, STEP, rounds=9)
    kept = {}
    for name in found:
        steps.forget(name)
        # not the saved tensors alone: bitsandbytes keeps an input as an attribute
        kept[name] = allocated(partial(steps.loss, name))[0]
    note = f"batch {BATCH} x {LENGTH}, all-linear, r=8"
    count(f"bytes kept, {row}", kept, target=KEPT, note=note)


@pytest.mark.parametrize("kind", MAKERS)
def test_decode(compare: Callable[..., Any], kind: str) -> None:
    found = {name: model.eval() for name, model in models(kind, 0.0).items()}
    ids = tokens(MEDIUM, 1, PROMPT)
    greedy = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    compare(
        f"decode {NEW} tokens {kind}, {MEDIUM}",
        {n: Work(partial(m.generate, input_ids=ids, **greedy)) for n, m in found.items()},
        target=DECODE,
        rounds=9,
        note=f"batch 1, prompt of {PROMPT}, KV cache, all-linear, r=8",
    )
