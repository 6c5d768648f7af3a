"""``peftkern train``: trains and saves an adapter; the run can be killed at any moment.

Several processes train one adapter together (:mod:`.ranks`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import liger
from .._version import __version__
from ..files.atomic import write_text_atomically
from ..utils.private import use_one_gpu
from . import resume, shards
from .config_file import as_yaml
from .data import Dataset, read_data
from .encode import Example, collator, pad_id
from .errors import UserError, first_line
from .modelio import NOT_HERE, hush_transformers, load_tokenizer, locate_model
from .options import option
from .packing import packed_collator
from .prepare import device_of, fingerprint, look_across, make_model, prepare_data
from .ranks import Ranks, join, on_cpu, refuse_other_precision
from .settings import TrainSettings, deepspeed_config, differing


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
    found = ranks.together(lambda: _look(settings, fresh, ranks))
    _refuse_unlike(ranks, found, settings.out)
    if found.done is not None:
        console.print(f"Already trained: {out} holds the adapter. --fresh trains it again.")
        return found.done
    for message in found.messages:
        console.print(f"[yellow]{message}[/yellow]")
    if settings.deepspeed is not None:
        shards.start_deepspeed()
    # before the model: with ZeRO-3 it is divided while it is read
    arguments = ranks.together(lambda: _training_arguments(settings, ranks))
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


@dataclass
class _Found:
    """What a run has to go on from, and its data."""

    folder: str
    data: Dataset
    identity: dict[str, Any]
    done: dict[str, Any] | None = None  # the record of the finished run
    checkpoint: resume.Checkpoint | None = None
    messages: list[str] = field(default_factory=list)


def _look(settings: TrainSettings, fresh: bool, ranks: Ranks) -> _Found:
    """Read the data and find the last checkpoint."""
    _refuse_liger(settings)
    _refuse_sharding(settings, ranks)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a folder")
    resume.refuse_foreign_adapter(out)
    folder, gguf_file = locate_model(settings.model, settings.gguf_file)
    messages = [] if Path(folder).exists() else [f"--model {folder}: {NOT_HERE}"]
    data = read_data(settings.data, settings.task, settings.data_format)
    settings.bf16 = _resolve_bf16(settings)
    refuse_other_precision(settings.bf16)
    settings.gguf_file = gguf_file
    found = _Found(folder, data, settings.identity(data.sha256, ranks.count))
    found.messages = messages
    if fresh:
        return found
    found.done = resume.finished(out)
    if found.done is not None:
        where = f"the finished run in {out}"
        found.done["identity"]["order"] = found.identity["order"]  # it sees no example any more
        resume.refuse_other_settings(found.done["identity"], found.identity, where)
        return found
    found.checkpoint, skipped = resume.find(out)
    found.messages += skipped
    if found.checkpoint is not None:
        where = str(found.checkpoint.path)
        resume.refuse_other_settings(found.checkpoint.identity, found.identity, where)
    return found


def _refuse_unlike(ranks: Ranks, found: _Found, out: str) -> None:
    """Raise a UserError when processes were started with unlike settings, or see unlike files."""
    step = found.checkpoint.step if found.checkpoint else None
    seen = ranks.gather((found.identity, found.done is not None, step))
    for number, (identity, *state) in enumerate(seen):
        name = differing(seen[0][0], identity)
        if name is not None:
            values = [str(seen[i][0].get(name)) for i in (0, number)]
            raise UserError(
                f"{option(name)} is {values[0]} in process 0 and {values[1]} in process {number}; "
                "all processes must have the same settings and data",
                everywhere=True,
            )
        if state != list(seen[0][1:]):
            raise UserError(
                f"--out {out} holds other checkpoints for process {number} than for process 0; it "
                "must be one folder that all processes see",
                everywhere=True,
            )


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
    settings: TrainSettings, found: _Found, console: Console
) -> tuple[Any, list[Example], list[Example], Any]:
    """(tokenizer, training examples, held-out examples, model with adapters)."""
    tokenizer = load_tokenizer(found.folder, settings.gguf_file)
    training, held = prepare_data(settings, found.data, tokenizer, console)
    pad = pad_id(tokenizer)
    model = make_model(settings, found.folder, settings.gguf_file, found.data.label_names, pad)
    if settings.packing:
        look_across(model, console)
    return tokenizer, training, held, model


def _resolve_bf16(settings: TrainSettings) -> bool:
    """True to compute in bf16: the default on GPUs that have it (a CPU is slower than in fp32)."""
    gpu = device_of(settings) == "cuda"
    if settings.bf16 is None:
        return gpu and torch.cuda.is_bf16_supported()
    if settings.bf16 and gpu and not torch.cuda.is_bf16_supported():
        raise UserError("--bf16: this GPU has no bfloat16; leave the option out")
    return settings.bf16


def _refuse_sharding(settings: TrainSettings, ranks: Ranks) -> None:
    """Raise a UserError when --fsdp or --deepspeed is given and cannot be had."""
    if settings.deepspeed is not None:
        deepspeed_config(settings.deepspeed)
        if settings.fsdp:
            raise UserError("--deepspeed does not go with --fsdp; give one of them")
        if settings.load_in is not None:
            raise UserError(f"--deepspeed does not go with --load-in {settings.load_in}")
        for package in ("deepspeed", "peft"):  # Trainer saves adapters alone for HF PEFT's class
            if find_spec(package) is None:
                raise UserError(f"--deepspeed needs the package '{package}': pip install {package}")
    for name in ("fsdp", "deepspeed"):
        if getattr(settings, name) and ranks.count == 1:
            raise UserError(
                f"{option(name)} divides the model among several processes, and this is one; start "
                "it with torchrun or accelerate launch"
            )
    if settings.deepspeed is not None and device_of(settings) == "cpu":
        raise UserError("--deepspeed runs on GPUs alone; --fsdp divides a model on CPUs too")
    if settings.fsdp and settings.load_in == "8bit":
        raise UserError("--fsdp does not go with --load-in 8bit: FSDP cannot divide int8 weights")


def _refuse_liger(settings: TrainSettings) -> None:
    """Raise a UserError when --liger is given and cannot be had on this machine."""
    if not settings.liger:
        return
    try:
        liger.patches()
    except ImportError as error:
        raise UserError(f"--{first_line(error)}") from error
    if not liger.runs_on(device_of(settings)):
        raise UserError("--liger: liger-kernel needs a GPU, and the training is on the CPU")


def _run(
    settings: TrainSettings,
    arguments: Any,
    ranks: Ranks,
    found: _Found,
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
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=packed_collator(pad_id(tokenizer)) if settings.packing else collate,
        train_dataset=training,
        task=settings.task,
        identity=found.identity,
        notes=notes,
        keep=settings.keep,
        ranks=ranks,
        sharded=settings.fsdp,
    )
    size = settings.batch_size
    batches = [collate(held[i : i + size]) for i in range(0, len(held), size)]

    def measure() -> dict[str, float]:
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
        console.print(f"going on from {checkpoint.path.name}")
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
    }
    if measured:
        console.print(f"held out, after:  {_said(record['after'])}")
    out = Path(settings.out)

    state = shards.trained(model) if settings.fsdp or settings.deepspeed else None

    def save() -> None:
        save_adapter(model, out, state)
        tokenizer.save_pretrained(out)
        # written last: if it exists, all other files do
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        write_text_atomically(out / resume.FINISHED, text)

    ranks.writes(save)
    console.print(f"adapter saved in {out}")
    return record


def _training_arguments(settings: TrainSettings, ranks: Ranks) -> Any:
    from transformers import TrainingArguments

    options: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    args = TrainingArguments(
        output_dir=settings.out,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps if settings.steps is not None else -1,
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would hide a loss that is not finite
        seed=settings.seed,
        bf16=bool(settings.bf16),
        use_cpu=on_cpu(settings.cpu) or (ranks.count > 1 and device_of(settings) == "cpu"),
        ddp_find_unused_parameters=False,  # but see `AdapterTrainer.get_ready_for_ddp`
        ddp_broadcast_buffers=False,  # no step changes them
        average_tokens_across_devices=False,  # AdapterTrainer does
        # Trainer would remove columns that are not in the signature of the PeftModel
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        deepspeed=settings.deepspeed,
        dataloader_pin_memory=device_of(settings) == "cuda",
        **options,
    )
    if args.n_gpu > 1:
        use_one_gpu(args)
    return args


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
