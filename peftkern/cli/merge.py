"""``peftkern merge``: a model with adapters merged into its weights, as a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..tuners.lora.base import LoraLayer
from ..utils.peft_types import PeftType
from .after_settings import MergeSettings
from .errors import UserError, first_line
from .modelio import hush_transformers
from .opening import Opened, dtype_of, find, open_model, open_tokenizer


def merge(settings: MergeSettings, console: Console | None = None) -> Path:
    """Write the merged model and its tokenizer into ``--out``; return the folder.

    The weights are dense: a quantised base is dequantised. The folder appears when it is complete.
    """
    settings.validate()
    hush_transformers()
    console = console or Console()
    out = new_folder(settings.out)
    opened = find(settings.adapter, settings.model, settings.gguf_file)
    weights = weights_of(settings.weights, opened)
    for name, config in opened.configs.items():
        if config.is_prompt_learning:
            method = PeftType(config.peft_type).value
            raise UserError(
                f"--adapter {opened.adapters[name]}: virtual tokens ({method}) cannot be merged "
                "into weights"
            )
    usual = None if settings.load_in else "auto"
    dtype = dtype_of(settings.dtype, settings.cpu, usual)
    model = open_model(opened, dtype, settings.load_in, settings.cpu)
    tokenizer = open_tokenizer(opened)
    merged = merged_model(model, opened, weights, settings.dtype)
    whole_folder(out, lambda place: _save(merged, tokenizer, place))
    size = sum(p.stat().st_size for p in out.iterdir())
    console.print(f"{out}: {_many(len(opened.adapters))} merged, {size / 2**20:.1f} MiB")
    return out


def weights_of(given: str | None, opened: Opened) -> list[float]:
    """The numbers of ``--weights``, one for each adapter; ones without the option."""
    if given is None:
        return [1.0] * len(opened.adapters)
    try:
        weights = [float(part) for part in given.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(opened.adapters) or not all(abs(w) < float("inf") for w in weights):
        raise UserError(
            f"--weights {given}: must be {len(opened.adapters)} numbers with commas, one for each "
            "--adapter"
        )
    return weights


def _many(adapters: int) -> str:
    return f"{adapters} adapter" + "s" * (adapters != 1)


def merged_model(model: Any, opened: Opened, weights: list[float], dtype: str | None) -> Any:
    """The base model with s w B A of each adapter added; UserError when that cannot be."""
    for name, weight in zip(opened.adapters, weights, strict=True):
        config = opened.configs[name]
        if weight != 1 and (getattr(config, "use_dora", False) or config.modules_to_save):
            raise UserError(
                f"--weights: {name} has DoRA or modules trained in full, which have no share"
            )
        for module in model.modules():
            if weight != 1 and isinstance(module, LoraLayer):
                module.set_scale(name, weight)
    quantised = getattr(model.config, "quantization_config", None) is not None
    options = {"dequantize": dtype_of(dtype, True) if dtype else True} if quantised else {}
    try:
        return model.merge_and_unload(
            safe_merge=True, adapter_names=list(opened.adapters), **options
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"the adapters cannot be merged: {first_line(error)}") from error


def _save(model: Any, tokenizer: Any, place: Path) -> None:
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def new_folder(out: str) -> Path:
    """The folder that ``--out`` names; UserError when something is there already."""
    path = Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--out {out}: exists and is no empty folder; give a new one")
    return path


def whole_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary folder beside ``out``, then rename it to ``out``."""
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex}.tmp"
    try:
        partial.mkdir(parents=True)
        write(partial)
        # safetensors' files are private; a server often runs as another user
        mode = partial.stat().st_mode & 0o666
        for path in partial.iterdir():
            if path.is_file():
                path.chmod(mode)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
