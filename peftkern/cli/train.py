"""``peftkern train``: trains and saves an adapter; the run can be killed at any moment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import liger
from ..files.atomic import write_text_atomically
from ..utils.private import use_one_gpu
from . import resume
from .data import Dataset, read_data, split_records
from .encode import Example, collator, encode, pad_id
from .errors import UserError, first_line
from .modelio import hush_transformers, load_model, load_tokenizer, locate_model
from .options import option
from .settings import TrainSettings


def train(
    settings: TrainSettings, fresh: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run or continue the training that ``settings`` describe; return the finished run's record.

    All errors of the input are found before the first byte is written. Raises UserError for wrong
    input and RunError when the training fails.
    """
    console = console or Console()
    settings.validate()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("train runs in one process; start it without torchrun or accelerate launch")
    _refuse_liger(settings)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a folder")
    resume.refuse_foreign_adapter(out)
    folder, gguf_file = locate_model(settings.model, settings.gguf_file)
    data = read_data(settings.data, settings.task)
    settings.bf16 = _resolve_bf16(settings)
    settings.gguf_file = gguf_file
    identity = settings.identity(data.sha256)

    checkpoint = None
    if not fresh:
        done = resume.finished(out)
        if done is not None:
            resume.refuse_other_settings(done["identity"], identity, f"the finished run in {out}")
            console.print(f"Already trained: {out} holds the adapter. --fresh trains it again.")
            return done
        checkpoint, messages = resume.find(out)
        for message in messages:
            console.print(f"[yellow]{message}[/yellow]")
        if checkpoint is not None:
            resume.refuse_other_settings(checkpoint.identity, identity, str(checkpoint.path))

    hush_transformers()
    tokenizer = load_tokenizer(folder, gguf_file)
    training, held = _prepare_data(settings, data, tokenizer, console)
    model = _make_model(settings, folder, gguf_file, data.label_names, pad_id(tokenizer))

    # from here on the input is known to be right
    if fresh:
        resume.clear(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    return _run(settings, identity, checkpoint, model, tokenizer, training, held, console)


def _resolve_bf16(settings: TrainSettings) -> bool:
    """True to compute in bf16: the default on GPUs that have it (a CPU is slower than in fp32)."""
    gpu = torch.cuda.is_available() and not settings.cpu
    if settings.bf16 is None:
        return gpu and torch.cuda.is_bf16_supported()
    if settings.bf16 and gpu and not torch.cuda.is_bf16_supported():
        raise UserError("--bf16: this GPU has no bfloat16; leave the option out")
    return settings.bf16


def _refuse_liger(settings: TrainSettings) -> None:
    """Raise a UserError when --liger is given and cannot be had on this machine."""
    if not settings.liger:
        return
    try:
        liger.patches()
    except ImportError as error:
        raise UserError(f"--{first_line(error)}") from error
    if not liger.runs_on(_device(settings)):
        raise UserError("--liger: liger-kernel needs a GPU, and the training is on the CPU")


def _device(settings: TrainSettings) -> str:
    return "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"


def _prepare_data(
    settings: TrainSettings, data: Dataset, tokenizer: Any, console: Console
) -> tuple[list[Example], list[Example]]:
    training, held = split_records(data.records, settings.eval_split, settings.seed)
    parts = [
        encode(part, tokenizer, settings.task, settings.max_length, data.label_names)
        for part in (training, held)
    ]
    if not parts[0].examples:
        raise UserError(
            f"--data {settings.data}: none of the {len(training)} training examples keeps a target "
            f"within --max-length {settings.max_length}"
        )
    console.print(
        f"{len(parts[0].examples)} training and {len(parts[1].examples)} held-out examples"
        + (f", {len(data.label_names)} labels" if data.label_names else "")
    )
    for count, what in (
        (data.empty, "left out: no text"),
        (
            sum(p.unusable for p in parts),
            f"left out: no target within {settings.max_length} tokens",
        ),
        (sum(p.cut for p in parts), f"cut to {settings.max_length} tokens (--max-length)"),
    ):
        if count:
            console.print(f"[yellow]{count} examples {what}[/yellow]")
    return parts[0].examples, parts[1].examples


def _make_model(
    settings: TrainSettings, folder: str, gguf_file: str | None, label_names: list[str], pad: int
) -> Any:
    """The base model with new adapters; the same seed gives the same adapters."""
    from transformers import set_seed

    from ..fusing import fuse
    from ..mapping import get_peft_model
    from ..quantising import quantize_base
    from ..tuners.lora import LoraConfig

    set_seed(settings.seed)  # for the random first values of classification head and A
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    bits = settings.load_in if settings.load_in != "fp8" else None
    if bits is not None and gguf_file is not None:
        raise UserError(f"--load-in {bits} does not go with a GGUF model")
    base = load_model(folder, settings.task, gguf_file, label_names, dtype, bits, _device(settings))
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad  # with it classifiers on decoders find the last real token
    try:
        config = LoraConfig(
            task_type=settings.task.upper(),
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_list(),
            use_rslora=settings.rslora,
        )
        model = get_peft_model(base, config)
        if settings.load_in == "fp8":
            quantize_base(model, "fp8")
    except ValueError as error:
        message = f"{option('target_modules')} {settings.target_modules}: {first_line(error)}"
        raise UserError(message) from error
    if settings.liger:
        try:
            fuse(model.to(_device(settings)), liger=True)
        except (ValueError, ImportError) as error:
            raise UserError(f"--{first_line(error)}") from error
    return model


def _run(
    settings: TrainSettings,
    identity: dict[str, Any],
    checkpoint: resume.Checkpoint | None,
    model: Any,
    tokenizer: Any,
    training: list[Example],
    held: list[Example],
    console: Console,
) -> dict[str, Any]:
    from .engine import AdapterTrainer, Watch, held_out, save_adapter

    collate = collator(pad_id(tokenizer))
    notes: dict[str, Any] = checkpoint.notes if checkpoint else {}
    trainer = AdapterTrainer(
        model=model,
        args=_training_arguments(settings),
        data_collator=collate,
        train_dataset=training,
        task=settings.task,
        identity=identity,
        notes=notes,
        keep=settings.keep,
    )
    size = settings.batch_size
    batches = [collate(held[i : i + size]) for i in range(0, len(held), size)]

    def measure() -> dict[str, float]:
        with trainer.accelerator.autocast():
            return held_out(model, batches, settings.task)

    if batches and "before" not in notes:
        notes["before"] = measure()
        console.print(f"held out, before: {_said(notes['before'])}")
    if checkpoint:
        console.print(f"going on from {checkpoint.path.name}")
    started = time.perf_counter()
    if checkpoint and checkpoint.last:
        # only the final save is missing; Trainer would run one more step here
        trainer.restore(str(checkpoint.path))
    else:
        with _progress(console) as progress:
            task = progress.add_task("training", total=None, loss="")
            trainer.add_callback(Watch(progress, task))
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    seconds = time.perf_counter() - started
    first_step = checkpoint.step if checkpoint else 0
    record = {
        "identity": identity,
        "steps": trainer.state.global_step,
        "losses": [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e],
        "before": notes.get("before"),
        "after": measure() if batches else None,
        "seconds_of_this_call": seconds,
        "steps_of_this_call": trainer.state.global_step - first_step,
    }
    if batches:
        console.print(f"held out, after:  {_said(record['after'])}")
    out = Path(settings.out)
    save_adapter(model, out)
    tokenizer.save_pretrained(out)
    # written last: if it exists, all other files do
    write_text_atomically(
        out / resume.FINISHED, json.dumps(record, indent=1, sort_keys=True) + "\n"
    )
    console.print(f"adapter saved in {out}")
    return record


def _training_arguments(settings: TrainSettings) -> Any:
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
        use_cpu=settings.cpu,
        # Trainer would remove columns that are not in the signature of the PeftModel
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available() and not settings.cpu,
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
