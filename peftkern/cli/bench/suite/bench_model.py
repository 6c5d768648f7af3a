"""The rows of ``peftkern bench``, which pytest collects and pytest-benchmark times.

Before a row is timed, the numbers of HF PEFT and peftkern are compared (``agree``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from peftkern.cli.bench.contest import Contest, Step
from peftkern.cli.bench.measure import BARE, OURS, PEFT, allocated, kept_bytes
from peftkern.running import runner

Agree = Callable[[str, Any, Any], None]


def shown(contest: Contest) -> str:
    s = contest.settings
    return f"{s.batch_size} x {s.length} tokens, {s.target_modules}, r={s.lora_r}"


@pytest.mark.parametrize("which", ["without dropout", "with dropout"])
def bench_training(compare: Any, contest: Contest, agree: Agree, which: str) -> None:
    p = contest.settings.lora_dropout if which == "with dropout" else 0.0
    step = Step(contest, p)
    for name in (PEFT, OURS):
        step.forget(name)
    if contest.device.type == "cpu" or not p:  # on a GPU the libraries draw different dropout
        losses = {n: step.works[n].run() for n in (PEFT, OURS) if step.forget(n) == ()}
        agree(f"loss {which}", losses[OURS], losses[PEFT])
    compare(
        f"training step {which}", step.works, rounds=contest.settings.rounds,
        note=f"{shown(contest)}; bare: gradient of the embeddings",
    )  # fmt: skip


def bench_memory(compare: Any, count: Any, contest: Contest) -> None:
    p = contest.settings.lora_dropout
    step = Step(contest, p)
    weights = [*contest.base.parameters(), step.embedded]
    kept, peak = {}, {}
    for name, model in step.models.items():
        step.forget(name)
        own = [*weights, *model.parameters()]
        kept[name] = float(kept_bytes(partial(step.loss, name), own))
        step.forget(name)
        peak[name] = float(_peak(contest, partial(step.run, name)))
    note = f"{shown(contest)}, dropout {p}"
    count("bytes kept for backward", kept, note=note)
    count("peak memory of a training step, beyond the weights", peak, note=note)
    one = {n: w for n, w in step.works.items() if n in (PEFT, OURS)}
    compare("training step for memory", one, rounds=3, warmup=0)


def _peak(contest: Contest, run: Callable[[], Any]) -> int:
    if contest.device.type != "cuda":
        return allocated(run)[1]
    torch.cuda.synchronize(contest.device)
    torch.cuda.reset_peak_memory_stats(contest.device)
    before = torch.cuda.memory_allocated(contest.device)
    run()
    torch.cuda.synchronize(contest.device)
    return torch.cuda.max_memory_allocated(contest.device) - before


@pytest.mark.parametrize("which", ["first token", "answer", "runner"])
def bench_decoding(compare: Any, contest: Contest, agree: Agree, which: str) -> None:
    s = contest.settings
    models = {name: model.eval() for name, model in contest.models().items()}
    ids = contest.tokens(1, s.length)
    n = 1 if which == "first token" else s.new_tokens
    how = {
        "max_new_tokens": n, "min_new_tokens": n, "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with torch.no_grad():
        agree("logits", models[OURS](ids).logits, models[PEFT](ids).logits)
    calls = {name: partial(m.generate, input_ids=ids, **how) for name, m in models.items()}
    row = {"first token": "first token of an answer", "answer": f"answer of {n} tokens"}.get(
        which, f"answer of {n} tokens, by peftkern.runner"
    )
    if which == "runner":
        run = runner(models[OURS])
        calls[OURS] = partial(run.generate, ids, None, n, eos_token_id=[])
    works = {name: contest.work(call) for name, call in calls.items()}
    note = f"batch 1, prompt of {s.length}, {s.target_modules}, r={s.lora_r}"
    note += "; the others by generate" if which == "runner" else ""
    compare(row, works, rounds=s.rounds, note=note)


def bench_mixed(compare: Any, contest: Contest, agree: Agree) -> None:
    s = contest.settings
    models = contest.with_adapters(s.adapters)
    rows = 2 * s.adapters
    ids = contest.tokens(rows, max(1, s.length // 8))
    names = [f"a{i % s.adapters}" if i % s.adapters else "default" for i in range(rows)]
    calls = {name: partial(m, ids, adapter_names=names) for name, m in models.items()}
    calls[BARE] = partial(contest.base, ids)
    with torch.no_grad():
        agree("logits of a mixed batch", calls[OURS]().logits, calls[PEFT]().logits)
        works = {name: contest.work(calls[name]) for name in (BARE, PEFT, OURS)}
        compare(
            f"mixed batch of {s.adapters} adapters", works, rounds=s.rounds,
            note=f"{rows} x {ids.shape[1]} tokens, no grad, {s.target_modules}, r={s.lora_r}",
        )  # fmt: skip
