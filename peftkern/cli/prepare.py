"""What ``peftkern train`` trains: the encoded examples, and the base model with new adapters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from rich.console import Console

from ..utils.private import attention_name
from .chat import has_template, how_marked, read_template
from .data import Dataset, split_records
from .encode import Example, encode
from .errors import UserError, first_line
from .methods import METHODS, make_config, refuse_unknown_targets
from .modelio import load_model
from .options import option
from .packing import pack, sees_across
from .ranks import on_cpu
from .settings import TrainSettings


def device_of(settings: TrainSettings) -> str:
    """The kind of device that the run is on: "cuda" or "cpu"."""
    # of several GPUs, `join` has chosen one for this process
    return "cuda" if torch.cuda.is_available() and not on_cpu(settings.cpu) else "cpu"


def prepare_data(
    settings: TrainSettings, data: Dataset, tokenizer: Any, console: Console
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; says what was left out. UserError when none is usable."""
    if settings.chat_template is not None:
        tokenizer.chat_template = read_template(settings.chat_template)[0]
    training, held = split_records(data.records, settings.eval_split, settings.seed)
    parts = [
        encode(part, tokenizer, settings.forms_of(), settings.max_length, data.label_names)
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
    if any(record.turns for record in data.records) and settings.forms_of() == "causal_lm":
        console.print(
            how_marked(tokenizer)
            if has_template(tokenizer)
            else "no chat template: instructions are written in Alpaca's form"
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
    if not settings.packing:
        return parts[0].examples, parts[1].examples
    rows = pack(parts[0].examples, settings.max_length)
    tokens = sum(len(row["input_ids"]) for row in rows)
    console.print(
        f"packed into {len(rows)} rows of up to {settings.max_length} tokens, "
        f"{tokens / (len(rows) * settings.max_length):.0%} full"
    )
    return rows, parts[1].examples


def look_across(model: Any, console: Console) -> None:
    """Say it when examples of a packed row see each other."""
    if sees_across(model):
        how = attention_name(model.config)
        console.print(
            f"[yellow]--packing: the attention of this model ({how}) sees the earlier examples of "
            "a row[/yellow]"
        )


def make_model(
    settings: TrainSettings, folder: str, gguf_file: str | None, label_names: list[str], pad: int
) -> Any:
    """The base model with new adapters; the same seed gives the same adapters."""
    from transformers import set_seed

    from ..fusing import fuse
    from ..mapping import get_peft_model
    from ..quantising import quantize_base

    set_seed(settings.seed)  # for the random first values of classification head and A
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    bits = settings.load_in if settings.load_in != "fp8" else None
    if bits is not None and gguf_file is not None:
        raise UserError(f"--load-in {bits} does not go with a GGUF model")
    base = load_model(
        folder,
        settings.task,
        gguf_file,
        label_names,
        dtype,
        bits,
        device_of(settings),
        settings.fsdp,
    )
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad  # with it classifiers on decoders find the last real token
    refuse_unknown_targets(settings, base)
    try:
        model = get_peft_model(base, make_config(settings))
        if settings.load_in == "fp8":
            quantize_base(model, "fp8")
    except ValueError as error:
        on = f"{option('target_modules')} {settings.target_modules}"
        of = on if METHODS[settings.method].on_layers else f"--method {settings.method}"
        raise UserError(f"{of}: {first_line(error)}") from error
    if settings.liger:
        try:
            fuse(model.to(device_of(settings)), liger=True)
        except (ValueError, ImportError) as error:
            raise UserError(f"--{first_line(error)}") from error
    return model


def fingerprint(model: Any) -> str:
    """A hash of the beginning of every parameter, which differs between different weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.data
        if type(values) is torch.Tensor and values.device.type != "meta":
            digest.update(values.reshape(-1)[:512].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
