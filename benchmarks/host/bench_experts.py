"""Adapters on a mixture's experts: a training step, one token, bytes kept and the peak of a step.

The model is a Qwen3-MoE without its embedding's size: 512 wide, experts of 256, 8 of them for a
token, adapters of rank 16 on ``gate_up_proj`` and ``down_proj`` of all experts and on q and v. The
bare model takes the gradient of its embeddings, as a frozen one has nothing to train.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .llama import LIBRARIES, equalise, share
from .measure import BARE, OURS, PEFT, Work, allocated, check_equal, kept_bytes

VOCAB = 1000
# experts, tokens: limits of a step, of one token, and of the bytes kept, as parts of HF PEFT's
LIMITS = {(64, 512): (0.42, 0.05, 0.15), (32, 256): (0.48, 0.12, 0.18), (4, 256): (1.0, 1.0, 1.0)}
PEAK = 0.5


def build(experts: int, layers: int) -> Qwen3MoeForCausalLM:
    """A frozen model with drawn weights, whose experts run as transformers runs them by default."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        num_experts=experts, num_experts_per_tok=min(8, experts), num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, decoder_sparse_step=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def models(experts: int, layers: int) -> dict[str, Any]:
    """{provider: model}, with equal adapters."""
    base = build(experts, layers)
    found: dict[str, Any] = {BARE: share(base)}
    # a copy of its own: the embeddings that train belong to the bare model alone
    embeddings = nn.Embedding.from_pretrained(base.get_input_embeddings().weight, freeze=False)
    found[BARE].set_input_embeddings(embeddings)
    for name, library in LIBRARIES.items():
        config = library.LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = library.get_peft_model(share(base), config)
    equalise(found[PEFT], found[OURS])
    return found


def loss(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def step(model: Any, ids: Tensor) -> Tensor:
    found = loss(model, ids)
    found.backward()  # type: ignore[no-untyped-call]
    return found


def forget(model: nn.Module) -> tuple[()]:
    model.zero_grad(set_to_none=True)
    return ()


def one_token(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def check(found: dict[str, Any], ids: Tensor) -> None:
    """Raise AssertionError where peftkern's loss, logits or gradients are not HF PEFT's."""
    made = {}
    for name in (PEFT, OURS):
        forget(found[name])
        made[name] = [step(found[name], ids), one_token(found[name], ids[:, :1])]
        made[name] += [w.grad for w in found[name].parameters() if w.grad is not None]
        forget(found[name])
    for i, (ours, theirs) in enumerate(zip(made[OURS], made[PEFT], strict=True)):
        scale = theirs.detach().abs().max()
        check_equal(f"number {i}", ours / scale, theirs / scale, 1e-4)


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("experts", "count_of_tokens"), LIMITS, ids="{}".format)
def test_mixture(
    compare: Callable[..., Any], count: Callable[..., Any], experts: int, count_of_tokens: int
) -> None:
    limits = LIMITS[experts, count_of_tokens]
    found, ids = models(experts, layers=2), tokens(count_of_tokens)
    check(found, ids)
    shape = f"{experts} experts"
    note = "Qwen3-MoE, 2 layers, 512 wide, experts of 256, top 8, r=16"
    kept = {n: kept_bytes(partial(loss, m, ids), [*m.parameters()]) for n, m in found.items()}
    row = f"mixture of {shape}, {count_of_tokens} tokens"
    count(f"bytes kept, {row}", kept, target=limits[2], note=note)
    peaks = {}
    for name, model in found.items():
        peaks[name] = allocated(partial(step, model, ids))[1]
        forget(model)
    count(f"peak of a step, {row}", peaks, target=PEAK if experts > 4 else 1.0, note=note)
    works = {n: Work(partial(step, m, ids), partial(forget, m)) for n, m in found.items()}
    compare(f"training step, {row}", works, rounds=15, target=limits[0], note=note)


@pytest.mark.parametrize(("experts", "count_of_tokens"), LIMITS, ids="{}".format)
def test_one_token(compare: Callable[..., Any], experts: int, count_of_tokens: int) -> None:
    found, ids = models(experts, layers=2), tokens(1)
    for model in found.values():
        model.eval()
    check_equal("logits", one_token(found[OURS], ids), one_token(found[PEFT], ids))
    compare(
        f"one token, no grad, mixture of {experts} experts",
        {name: Work(partial(one_token, model, ids)) for name, model in found.items()},
        rounds=31,
        target=LIMITS[experts, count_of_tokens][1],
        note="Qwen3-MoE, 2 layers, 512 wide, experts of 256, top 8, r=16",
    )


@pytest.mark.parametrize("experts", [8, 32, 128, 512])
def test_growth(compare: Callable[..., Any], experts: int) -> None:
    """With the tokens and their choices fixed, what E alone costs."""
    found, ids = models(experts, layers=1), tokens(64)
    works = {n: Work(partial(step, m, ids), partial(forget, m)) for n, m in found.items()}
    note = "64 tokens, 1 layer, 512 wide, experts of 256, top 8, r=16"
    compare(f"training step, 64 tokens, 1 layer of {experts} experts", works, rounds=9, note=note)
