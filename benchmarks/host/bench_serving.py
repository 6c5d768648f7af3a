"""Answers of a service: one text at low latency, and many requests with adapters of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import peftkern

from .llama import (
    LIBRARIES,
    MEDIUM,
    SMALL,
    Shape,
    adapt,
    build,
    equalise,
    lora_config,
    tokens,
    trio,
)
from .measure import BARE, OURS, PEFT, Work, check_equal

PROMPT, NEW = 16, 24
LONG = 128  # a prompt's tokens where the first token of an answer is timed
# of each request: its prompt's tokens and those of its answer
REQUESTS = [(8 + 11 * i % 57, 4 + 13 * i % 45) for i in range(16)]
ADAPTERS = 4


@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
@pytest.mark.parametrize("what", ["tokens", "first token"])
def test_runner(compare: Callable[..., Any], shape: Shape, what: str) -> None:
    models = {provider: model.eval() for provider, model in trio(build(shape)).items()}
    length, count = (PROMPT, NEW) if what == "tokens" else (LONG, 1)
    ids = tokens(shape, 1, length)
    greedy = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    works = {name: Work(partial(m.generate, input_ids=ids, **greedy)) for name, m in models.items()}
    works[OURS] = Work(partial(peftkern.runner(models[OURS]).generate, ids, None, count))
    assert torch.equal(works[OURS].run(), works[PEFT].run()), "the two generate different tokens"
    rate = f"{count} tokens" if count > 1 else "the first token"
    compare(
        f"runner: {rate} {shape}, all-linear",
        works,
        rounds=21 if shape is SMALL else 15,
        note=f"batch 1, prompt of {length}; peftkern.runner against generate() of the others",
    )


@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
def test_requests(compare: Callable[..., Any], shape: Shape) -> None:
    """HF PEFT pads a batch and waits for its longest answer; it has no door to generate_batch."""
    base = build(shape)
    models: dict[str, Any] = {}
    for provider, library in LIBRARIES.items():
        models[provider] = adapt(library, base, lora_config(library))
        for i in range(1, ADAPTERS):
            models[provider].add_adapter(f"a{i}", lora_config(library))
        models[provider].eval()
    equalise(models[PEFT], models[OURS])
    names = [f"a{i % ADAPTERS}" if i % ADAPTERS else "default" for i in range(len(REQUESTS))]
    prompts = [tokens(shape, 1, n)[0].roll(i).tolist() for i, (n, _) in enumerate(REQUESTS)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    wanted = [n for _, n in REQUESTS]
    greedy = {"max_new_tokens": max(wanted), "do_sample": False, "pad_token_id": 0}

    def padded(model: Any, **given: Any) -> list[list[int]]:
        out = model.generate(input_ids=ids, attention_mask=mask, **greedy, **given)
        return [row[longest:][:n].tolist() for row, n in zip(out, wanted, strict=True)]

    settings = GenerationConfig(**greedy, eos_token_id=-1)
    known = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in known else "block_size"  # before transformers 5.17
    sizes = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=256, **{page: 16})

    def batched(model: Any) -> list[list[int]]:
        begun = model.continuous_batching_context_manager(
            settings, continuous_batching_config=sizes, warmup=False
        )
        with begun as manager:
            asked = [
                manager.add_request(prompt, adapter_name=name, max_new_tokens=n)
                for prompt, name, n in zip(prompts, names, wanted, strict=True)
            ]
            found = {}
            while len(found) < len(asked):
                result = manager.get_result(timeout=60)
                found[result.request_id] = result.generated_tokens
        return [found[request] for request in asked]

    works = {
        BARE: Work(partial(padded, base)),
        PEFT: Work(partial(padded, models[PEFT], adapter_names=names)),
        OURS: Work(partial(batched, models[OURS])),
    }
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "adapter_names": names}
        check_equal("logits", *(models[p](**given).logits[:, -1] for p in (OURS, PEFT)))
    assert works[OURS].run() == works[PEFT].run(), "the two answer differently"
    compare(
        f"{len(REQUESTS)} requests with {ADAPTERS} adapters {shape}, all-linear",
        works,
        rounds=9,
        note=f"{sum(wanted)} tokens in answers of {min(wanted)} to {max(wanted)}; generate_batch "
        "with names against HF PEFT's padded batch; bare: that batch without adapters",
    )
