"""The rows of ``peftkern bench``, which pytest collects and pytest-benchmark times.

Before a row is timed, the numbers of HF PEFT and peftkern are compared (``agree``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from peftkern.cli.bench.contest import Answer, Contest, Step
from peftkern.cli.bench.measure import BARE, OURS, PEFT, Work
from peftkern.cli.bench.remote import PeerGone
from peftkern.running import runner

Agree = Callable[[str, Any, Any], None]


def shown(contest: Contest) -> str:
    s = contest.settings
    return f"{s.batch_size} x {s.length} tokens, {s.target_modules}, r={s.lora_r}"


def timed(compare: Any, contest: Contest, name: str, works: dict[str, Work], note: str) -> None:
    """A row of the table; a library whose process fails meanwhile is left out of it."""
    while True:
        try:
            compare(name, works, rounds=contest.settings.rounds, note=note)
            return
        except PeerGone as gone:
            contest.drop(gone)
            works = {n: w for n, w in works.items() if n != gone.name}


@pytest.mark.parametrize("which", ["without dropout", "with dropout"])
def bench_training(compare: Any, contest: Contest, agree: Agree, which: str) -> None:
    p = contest.settings.lora_dropout if which == "with dropout" else 0.0
    step = Step(contest, p)
    for name in (PEFT, OURS):
        step.forget(name)
    if contest.device.type == "cpu" or not p:  # on a GPU the libraries draw different dropout
        losses = {n: step.works[n].run() for n in (PEFT, OURS) if step.forget(n) == ()}
        agree(f"loss {which}", losses[OURS], losses[PEFT])
    note = f"{shown(contest)}; bare: gradient of the embeddings"
    timed(compare, contest, f"training step {which}", step.works, note)


def bench_memory(compare: Any, count: Any, contest: Contest) -> None:
    p = contest.settings.lora_dropout
    step = Step(contest, p)
    found = {name: step.memory(name) for name in step.models} | contest.memory_of_others()
    kept = {name: memory[0] for name, memory in found.items()}
    peak = {name: memory[1] for name, memory in found.items()}
    note = f"{shown(contest)}, dropout {p}"
    count("bytes kept for backward", kept, note=note)
    count("peak memory of a training step, beyond the weights", peak, note=note)
    one = {n: w for n, w in step.works.items() if n in (PEFT, OURS)}
    compare("training step for memory", one, rounds=3, warmup=0)


@pytest.mark.parametrize("which", ["first token", "answer", "runner"])
def bench_decoding(compare: Any, contest: Contest, agree: Agree, which: str) -> None:
    s = contest.settings
    n = 1 if which == "first token" else s.new_tokens
    answer = Answer(contest, n)
    models, ids = answer.models, answer.ids
    with torch.no_grad():
        agree("logits", models[OURS](ids).logits, models[PEFT](ids).logits)
    row = {"first token": "first token of an answer", "answer": f"answer of {n} tokens"}.get(
        which, f"answer of {n} tokens, by peftkern.runner"
    )
    if which == "runner":
        run = runner(models[OURS])
        answer.works[OURS] = contest.work(partial(run.generate, ids, None, n, eos_token_id=[]))
    note = f"batch 1, prompt of {s.length}, {s.target_modules}, r={s.lora_r}"
    note += "; the others by generate" if which == "runner" else ""
    timed(compare, contest, row, answer.works, note)


def bench_mixed(compare: Any, contest: Contest, agree: Agree) -> None:
    s = contest.settings
    models = contest.with_adapters(s.adapters)
    contest.base.eval()
    rows = 2 * s.adapters
    ids = contest.tokens(rows, max(1, s.length // 8))
    names = [f"a{i % s.adapters}" if i % s.adapters else "default" for i in range(rows)]
    calls = {name: partial(m, ids, adapter_names=names) for name, m in models.items()}
    calls[BARE] = partial(contest.base, ids)
    with torch.no_grad():
        agree("logits of a mixed batch", calls[OURS]().logits, calls[PEFT]().logits)
        works = {name: contest.work(calls[name]) for name in (BARE, PEFT, OURS)}
        note = f"{rows} x {ids.shape[1]} tokens, no grad, {s.target_modules}, r={s.lora_r}"
        timed(compare, contest, f"mixed batch of {s.adapters} adapters", works, note)
