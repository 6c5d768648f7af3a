"""transformers' ``TrainingArguments`` of a run of ``peftkern train``."""

from __future__ import annotations

from typing import Any

from ..utils.private import use_one_gpu
from .methods import names_in
from .prepare import device_of
from .ranks import Ranks, on_cpu
from .settings import TrainSettings


def training_arguments(settings: TrainSettings, ranks: Ranks) -> Any:
    from transformers import TrainingArguments

    options: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    kind: Any = TrainingArguments
    if settings.trainer != "transformers":
        from . import preferences

        kind, more = preferences.arguments(settings)
        options = {**more, **options}
    args = kind(
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
        report_to=names_in(settings.report_to),
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
