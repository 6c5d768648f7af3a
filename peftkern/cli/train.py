"""``peftkern train``: trains and saves an adapter; the run can be killed at any moment.

Several processes train one adapter together (:mod:`.ranks`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._version import __version__
from ..explaining import explain
from ..files.atomic import write_text_atomically
from . import preferences, resume, shards
from .arguments import training_arguments
from .config_file import as_yaml
from .encode import Example, collator, pad_id
from .errors import UserError
from .looking import Found, look, refuse_unlike
from .memory import PeakMeter
from .modelio import hush_transformers, load_tokenizer
from .packing import packed_collator
from .prepare import device_of, fingerprint, look_across, make_model, prepare_data
from .ranks import Ranks, join, on_cpu
from .report import report_of, said_speed
from .settings import TrainSettings


def train(
    settings: TrainSettings, fresh: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run or continue the training that ``settings`` describe; return the finished run's record.

    All errors of the input are found before the first byte is written. Raises UserError for wrong
    input and RunError when the training fails. Of several processes, which torchrun or
    ``accelerate launch`` start, the first one prints and writes.
    """
    settings.validate()
    hush_transformers()
    ranks = join(on_cpu(settings.cpu))
    if console is None or not ranks.first:
        console = Console(quiet=not ranks.first)
    record = _train(settings, ranks, fresh, console)
    ranks.leave()
    return record


def _train(settings: TrainSettings, ranks: Ranks, fresh: bool, console: Console) -> dict[str, Any]:
    out = Path(settings.out)
    found = ranks.together(lambda: look(settings, fresh, ranks))
    refuse_unlike(ranks, found, settings.out)
    if found.done is not None:
        console.print(f"Already trained: {out} holds the adapter. --fresh trains it again.")
        return found.done
    for message in found.messages:
        console.print(f"[yellow]{message}[/yellow]")
    if settings.deepspeed is not None:
        shards.start_deepspeed()
    # before the model: with ZeRO-3 it is divided while it is read
    arguments = ranks.together(lambda: training_arguments(settings, ranks))
    tokenizer, training, held, model = ranks.together(lambda: _prepare(settings, found, console))

    _refuse_unlike_weights(ranks, model, settings.model)

    # from here on the input is known to be right
    def make_out() -> None:
        told = as_yaml(settings.options(), __version__)
        if fresh:
            resume.clear(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
        write_text_atomically(out / resume.CONFIG, told)

    ranks.writes(make_out)
    return _run(settings, arguments, ranks, found, model, tokenizer, training, held, console)


def _refuse_unlike_weights(ranks: Ranks, model: Any, path: str) -> None:
    """Raise a UserError when processes have read unlike weights: nothing makes them alike later."""
    if ranks.count == 1:
        return
    seen = ranks.gather(fingerprint(model))
    other = next((number for number, value in enumerate(seen) if value != seen[0]), None)
    if other is not None:
        raise UserError(
            f"--model {path}: process {other} has read other weights than process 0",
            everywhere=True,
        )


def _prepare(
    settings: TrainSettings, found: Found, console: Console
) -> tuple[Any, list[Example], list[Example], Any]:
    """(tokenizer, training examples, held-out examples, model with adapters)."""
    tokenizer = load_tokenizer(found.folder, settings.gguf_file)
    training, held = prepare_data(settings, found.data, tokenizer, console)
    pad = pad_id(tokenizer)
    model = make_model(settings, found.folder, settings.gguf_file, found.data.label_names, pad)
    if settings.packing:
        look_across(model, console)
    return tokenizer, training, held, model


def _run(
    settings: TrainSettings,
    arguments: Any,
    ranks: Ranks,
    found: Found,
    model: Any,
    tokenizer: Any,
    training: list[Example],
    held: list[Example],
    console: Console,
) -> dict[str, Any]:
    from transformers import set_seed

    from .engine import AdapterTrainer, Watch, held_out, load_adapter, save_adapter

    collate = collator(pad_id(tokenizer))
    checkpoint = found.checkpoint
    if settings.fsdp:
        if checkpoint:
            load_adapter(model, str(checkpoint.path))
        shards.shard(model, device_of(settings))
    notes: dict[str, Any] = checkpoint.notes if checkpoint else {}
    packed = packed_collator(pad_id(tokenizer)) if settings.packing else collate
    ours: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "identity": found.identity,
        "notes": notes,
        "keep": settings.keep,
        "ranks": ranks,
    }
    if settings.trainer == "transformers":
        trainer = AdapterTrainer(
            data_collator=packed,
            train_dataset=training,
            task=settings.task,
            sharded=settings.fsdp,
            **ours,
        )
    else:
        trainer = preferences.make_trainer(settings, tokenizer, packed, training, held, **ours)
    size = settings.batch_size
    cuts = [held[i : i + size] for i in range(0, len(held), size)]
    batches: list[Any] = cuts if settings.trainer == "dpo" else list(map(collate, cuts))

    def measure() -> dict[str, float]:
        if settings.trainer == "dpo":
            return preferences.measured(trainer)
        with trainer.accelerator.autocast():
            return held_out(model, batches, settings.task, ranks)

    def begins() -> None:
        if batches and "before" not in notes:
            notes["before"] = measure()
            console.print(f"held out, before: {_said(notes['before'])}")

    per_step = size * settings.grad_accumulation * ranks.count
    if ranks.count > 1:
        console.print(
            f"{ranks.count} processes x {size} examples x {settings.grad_accumulation} passes: "
            f"{per_step} examples an optimizer step"
        )
        if not (settings.fsdp or settings.deepspeed):
            trainer.get_ready_for_ddp()
        # other dropout masks in each process; when a run goes on, its random state is read
        set_seed((settings.seed + ranks.index) % 2**32)
    if checkpoint:
        longer = ", with the learning rates of the longer run" if found.extends else ""
        console.print(f"going on from {checkpoint.path.name}{longer}")
    meter = PeakMeter(device_of(settings))
    meter.start()
    started = time.perf_counter()
    finished = checkpoint is not None and checkpoint.last
    # DeepSpeed makes the model whole for a call only in training that has begun
    measured = bool(batches) and not (finished and settings.deepspeed)
    if checkpoint and finished:
        # only the final save is missing; Trainer would run one more step here
        trainer.restore(str(checkpoint.path))
    else:
        with _progress(console) as progress:
            task = progress.add_task("training", total=None, loss="")
            trainer.add_callback(Watch(progress, task, begins))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            except (ValueError, AssertionError) as error:
                if settings.deepspeed is None or trainer.state.global_step:
                    raise
                # the configuration is looked at when the training begins
                message = f"--deepspeed {settings.deepspeed}: {error}"
                raise UserError(message, everywhere=True) from error
    seconds = time.perf_counter() - started
    peak = max(ranks.gather(meter.peak_mib()))
    first_step = checkpoint.step if checkpoint else 0
    record = {
        "identity": found.identity,
        "examples_per_step": per_step,
        "processes": ranks.count,
        "steps": trainer.state.global_step,
        "losses": [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e],
        "before": notes.get("before"),
        "after": measure() if measured else None,
        "seconds_of_this_call": seconds,
        "steps_of_this_call": trainer.state.global_step - first_step,
        "speed": trainer.pace.of_all(),
        "peak_mib": peak,
        "peak_is": meter.how,
        "runs_as": _runs_as(model),
    }
    if measured:
        console.print(f"held out, after:  {_said(record['after'])}")
    if record["speed"]:
        console.print(f"{said_speed(record)}; {record['runs_as']}")
    out = Path(settings.out)
    drawn = report_of(settings, record, trainer.state.log_history, console)
    state = shards.trained(model) if settings.fsdp or settings.deepspeed else None

    def save() -> None:
        save_adapter(model, out, state)
        tokenizer.save_pretrained(out)
        if drawn is not None:
            write_text_atomically(out / resume.REPORT, drawn)
        # written last: if it exists, all other files do
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        write_text_atomically(out / resume.FINISHED, text)

    ranks.writes(save)
    console.print(f"adapter saved in {out}")
    return record


def _runs_as(model: Any) -> str:
    """What the adapted layers run as: the summary of ``peftkern.explain``."""
    rows = explain(model)
    if not rows:  # a prompt is in no layer
        return f"{model.active_peft_config.num_virtual_tokens} virtual tokens before the input"
    return next(line for line in str(rows).splitlines() if " adapted layers: " in line)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _said(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
