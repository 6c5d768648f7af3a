"""``peftkern demo``: the same training in peftkern and in HF PEFT, step by step, side by side.

Each library runs in a process of its own (``worker.py``). They take turns of a few steps, on the
same batches from the same initial adapter, so that other load on the machine slows both equally.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...files.atomic import write_text_atomically
from ..errors import RunError
from ..modelio import hush_transformers
from .checks import disagreements, print_table
from .data import Kind, Prepared, model_folder, prepare, save_base
from .peers import NAMES, Peer, environment
from .settings import DemoSettings

TURN = 2  # number of steps of a worker before the other one's turn


def demo(settings: DemoSettings, console: Console | None = None) -> dict[str, Any]:
    """Run the demo and write ``demo-report.html``; return the data of the report.

    Raises UserError for an option or a missing package, RunError when the two libraries disagree.
    """
    console = console or Console()
    kind = settings.validate()
    source = model_folder(kind)
    steps = settings.steps or kind.steps
    started = time.perf_counter()
    out = Path(settings.out)
    providers = ["peftkern"]
    if importlib.util.find_spec("peft") is not None:
        providers.append("peft")
    else:
        console.print("[yellow]HF PEFT is not installed: no comparison, peftkern alone.[/yellow]")

    hush_transformers()
    out.mkdir(parents=True, exist_ok=True)
    with _scratch(out / ".demo-work") as work, ExitStack() as stack:
        with console.status("reading the model and the standard library"):
            tokenizer = save_base(kind, source, work / "base")
            data = prepare(kind, tokenizer, steps, settings.seed)
        base = work / "base" if (work / "base").exists() else source
        console.print(
            f"[bold]{kind.title}[/bold]\n{data.notes['training_examples']} training examples, "
            f"{data.notes['held_out_examples']} held out (from other files), {steps} steps of "
            f"{kind.batch_size}"
        )
        (work / "data.json").write_text(
            json.dumps({"pad": data.pad, "training": data.training, "held_out": data.held_out})
        )
        peers = []
        for name in providers:
            peers.append(Peer(name, work / f"{name}.log"))
            stack.callback(peers[-1].close)
        run = _run(settings, kind, steps, data, base, work, peers, tokenizer, console)
        if (out / "adapter").exists():
            shutil.rmtree(out / "adapter")
        shutil.copytree(work / "adapter", out / "adapter")
    run["seconds"] = time.perf_counter() - started

    from .report import write_report

    write_text_atomically(out / "demo-report.json", json.dumps(run, indent=1) + "\n")
    write_report(out / "demo-report.html", run)
    print_table(console, run)
    console.print(f"report: {out / 'demo-report.html'}    adapter: {out / 'adapter'}")
    if run["failures"]:
        raise RunError("; ".join(run["failures"]))
    return run


def _run(
    settings: DemoSettings,
    kind: Kind,
    steps: int,
    data: Prepared,
    base: Path,
    work: Path,
    peers: list[Peer],
    tokenizer: Any,
    console: Console,
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"
    threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = int(os.environ.get("OMP_NUM_THREADS") or threads)
    job = {
        "base": str(base),
        "task": kind.task,
        "label_names": data.label_names,
        "data": str(work / "data.json"),
        "batch_size": kind.batch_size,
        "device": device,
        "threads": threads,
        "lr": kind.lr,
        "seed": settings.seed,
        "initial": str(work / "initial"),
        "base_name": kind.base_name,
        "lora": {
            "task_type": kind.task.upper(),
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": settings.lora_dropout,
            "target_modules": list(kind.target_modules),
        },
    }
    with console.status("loading the model, one process for each library"):
        loaded: dict[str, dict[str, Any]] = {}
        for peer in peers:  # the first one makes the adapter with which all start
            loaded[peer.provider] = peer.ask(
                "load", provider=peer.provider, create=not loaded, **job
            )
    with console.status("held-out loss before training"):
        before = {p.provider: p.ask("held_out") for p in peers}
        texts_before = _sample_answers(peers[0], data, tokenizer)

    traces: dict[str, dict[str, Any]] = {
        p.provider: {"losses": [], "seconds": [], "tokens": []} for p in peers
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[loss]}"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bars = {
            p.provider: progress.add_task(f"{NAMES[p.provider]:9}", total=steps, loss="")
            for p in peers
        }
        for number, first in enumerate(range(0, steps, TURN)):
            # the order changes from turn to turn
            for peer in peers if number % 2 == 0 else peers[::-1]:
                answer = peer.ask("steps", count=min(TURN, steps - first))
                trace = traces[peer.provider]
                for key in ("losses", "seconds", "tokens"):
                    trace[key] += answer[key]
                trace["peak_mib"], trace["memory_how"] = answer["peak_mib"], answer["memory_how"]
                loss = f"loss {answer['losses'][-1]:.4f}"
                progress.update(bars[peer.provider], advance=len(answer["losses"]), loss=loss)

    with console.status("held-out loss after training"):
        after = {p.provider: p.ask("held_out") for p in peers}
        texts_after = _sample_answers(peers[0], data, tokenizer)
    with console.status("saving the adapter with peftkern, reading it again"):
        peers[0].ask("save", folder=str(work / "adapter"))
        logits = _reload(peers, work)

    run: dict[str, Any] = {
        "title": kind.title,
        "task": settings.task,
        "steps": steps,
        "batch_size": kind.batch_size,
        "max_length": kind.max_length,
        "lr": kind.lr,
        "lora": job["lora"],
        "lora_dropout": settings.lora_dropout,
        "data": data.notes,
        "environment": environment(device, threads, loaded),
        "providers": {
            name: {
                **trace,
                **_speed(trace),
                "before": before[name],
                "after": after[name],
                "trainable": loaded[name]["trainable"],
            }
            for name, trace in traces.items()
        },
        "step_time_ratio": _paired_ratio(traces),
        "logits": logits,
        "samples": [
            {"module": s.module, "prompt": s.text, "wanted": s.target, "before": b, "after": a}
            for s, b, a in zip(data.samples, texts_before, texts_after, strict=False)
        ],
    }
    run["failures"] = disagreements(run)
    return run


def _sample_answers(peer: Peer, data: Prepared, tokenizer: Any) -> list[str]:
    """The trained model's answers to the shown held-out examples: docstrings or topics."""
    if data.label_names:
        ids = peer.ask("classify", count=len(data.samples))["ids"]
        return [data.label_names[i] for i in ids]
    answer = peer.ask("generate", prompts=data.sample_prompts, new_tokens=32, pad=data.pad)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answer["ids"]]


def _reload(peers: list[Peer], work: Path) -> dict[str, float]:
    """The largest difference of logits between each trained model and its adapter from disk."""
    from safetensors.torch import load_file

    def logits(peer: Peer, name: str, reload: str | None) -> torch.Tensor:
        file = str(work / f"{name}.safetensors")
        peer.ask("logits", file=file, reload=reload)
        logits: torch.Tensor = load_file(file)["logits"]
        return logits

    trained = logits(peers[0], "trained", None)
    result = {"largest": trained.abs().max().item()}
    for peer in peers:
        again = logits(peer, f"again-{peer.provider}", str(work / "adapter"))
        result[peer.provider] = (again - trained).abs().max().item()
    return result


def _speed(trace: dict[str, Any]) -> dict[str, float]:
    """Median step time (s) and tokens/s, without the first step, which also allocates memory."""
    steps = list(zip(trace["tokens"], trace["seconds"], strict=True))
    steps = steps[1:] or steps
    return {
        "step_seconds": median(s for _, s in steps),
        "tokens_per_second": median(t / s for t, s in steps),
    }


def _paired_ratio(traces: dict[str, dict[str, Any]]) -> float | None:
    """The median of the ratio of peftkern's time to HF PEFT's time on the same batch."""
    if "peft" not in traces:
        return None
    pairs = list(zip(traces["peftkern"]["seconds"], traces["peft"]["seconds"], strict=True))
    return float(median(a / b for a, b in pairs[1:] or pairs))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A context with an empty folder that is removed afterwards (after a kill, by the next run)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
