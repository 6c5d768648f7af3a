"""``peftkern export``: an adapter in the form that vLLM, SGLang or llama.cpp reads."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..checkpoint.gguf_adapter import write_gguf
from ..checkpoint.inspecting import read_adapter
from ..checkpoint.plain import plain_form
from ..checkpoint.serving import BASE_COPY, TARGETS, Adapter, refusals
from ..checkpoint.state_dicts import get_peft_model_state_dict
from ..configs.lora import LoraConfig
from ..files.atomic import write_text_atomically
from ..files.base_names import name_for_file
from ..mapping import get_peft_model
from ..tuners.lora.plain import subtract_start
from ..utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from .after_settings import ExportSettings, MergeSettings
from .errors import UserError, first_line
from .merge import merge, new_folder, whole_folder
from .modelio import hush_transformers, load_model
from .opening import DTYPES, Opened, find

# starts that are the same each time that they are made from the base weights
_MADE_AGAIN = ("pissa", "olora")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export(settings: ExportSettings, console: Console | None = None) -> Path:
    """Write the adapter for ``--to``; return the folder or file.

    What the target cannot read is refused by name, before anything is written.
    """
    settings.validate()
    hush_transformers()
    console = console or Console()
    if settings.to == "merged":
        names = {f.name for f in fields(MergeSettings)} & {f.name for f in fields(ExportSettings)}
        values = {name: getattr(settings, name) for name in names - {"adapter"}}
        return merge(MergeSettings(adapter=[settings.adapter], **values), console)
    out = _new_place(settings)
    try:
        config, tensors = read_adapter(settings.adapter)
    except ValueError as error:
        raise UserError(f"--adapter {error}") from None
    if not config:
        raise UserError(f"--adapter {settings.adapter}: no {CONFIG_NAME} beside the file")
    _refuse(settings, config, tensors, mended=False)
    changed = refusals(settings.to, _adapter(settings, config, tensors))
    config, tensors = _plain(settings, config, tensors)
    _refuse(settings, config, tensors)
    if settings.to == "gguf":
        _write_gguf(settings, config, tensors, out)
    else:
        tensors = {name: tensor.to(_dtype(settings, tensor)) for name, tensor in tensors.items()}
        whole_folder(out, lambda place: _write_folder(settings, config, tensors, place, out))
    for reason in changed:
        console.print(f"written otherwise: {reason}")
    target = TARGETS[settings.to].removesuffix("'s converter")
    console.print(f"{out}: for {target}")
    console.print(_how(settings, config, out), soft_wrap=True, markup=False, highlight=False)
    return out


def _new_place(settings: ExportSettings) -> Path:
    if settings.to != "gguf":
        return new_folder(settings.out)
    out = Path(settings.out)
    if out.suffix != ".gguf":
        raise UserError(f"--out {out}: must be a .gguf file for --to gguf")
    if out.exists():
        raise UserError(f"--out {out}: exists; give a new file")
    return out


def _adapter(
    settings: ExportSettings, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Adapter:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Adapter(config, shapes, settings.max_rank)


def _refuse(
    settings: ExportSettings,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    mended: bool | None = None,
) -> None:
    """Raise a UserError with all reasons why the target does not read this."""
    reasons = refusals(settings.to, _adapter(settings, config, tensors), mended)
    if reasons:
        raise UserError(
            f"--to {settings.to}: {TARGETS[settings.to]} does not read {'; '.join(reasons)}. "
            "--to merged writes the whole model"
        )


def _plain(
    settings: ExportSettings, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) as the target reads them; the given ones if it reads those."""
    tensors = {name: t for name, t in tensors.items() if not BASE_COPY.search(name)}
    found = refusals(settings.to, _adapter(settings, config, tensors))
    start = str(config.get("init_lora_weights")).lower()
    try:
        if any("init_lora_weights" in reason for reason in found):
            tensors = subtract_start(tensors, _start(settings, start))
            config = _of_twice_the_rank(config)
        if refusals(settings.to, _adapter(settings, config, tensors), mended=True):
            config, tensors = plain_form(config, tensors)
    except ValueError as error:
        raise UserError(f"--adapter {settings.adapter}: {first_line(error)}") from error
    return config, tensors


def _of_twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an adapter from which its start was subtracted; every scale stays."""
    more = 2**0.5 if config.get("use_rslora") else 2
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return {
        **config,
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": more * config["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in ranks.items()},
        "alpha_pattern": {key: more * alpha for key, alpha in alphas.items()},
    }


def _start(settings: ExportSettings, start: str) -> dict[str, Tensor]:
    """The adapter before training: that of ``--initial``, or made again from the base model."""
    if settings.initial is not None:
        return read_adapter(settings.initial)[1]
    if start not in _MADE_AGAIN:
        raise ValueError(
            f'a start by init_lora_weights="{start}" is not the same each time: give the adapter '
            "as it was saved before training with --initial"
        )
    opened = _find(settings)
    base = load_model(opened.folder, opened.task, opened.gguf_file)
    config = next(iter(opened.configs.values()))
    assert isinstance(config, LoraConfig)
    config.inference_mode, config.base_model_name_or_path = False, base.name_or_path
    model = get_peft_model(base, config)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _find(settings: ExportSettings) -> Opened:
    place = Path(settings.adapter)
    folder = str(place.parent if place.is_file() else place)
    return find([folder], settings.model, settings.gguf_file)


def _dtype(settings: ExportSettings, tensor: Tensor) -> Any:
    return tensor.dtype if settings.dtype is None else DTYPES[settings.dtype]


def _write_folder(
    settings: ExportSettings,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    place: Path,
    out: Path,
) -> None:
    from safetensors.torch import save_file

    base = config.get("base_model_name_or_path")
    if isinstance(base, str):
        source = Path(settings.adapter)
        folder = source.parent if source.is_file() else source
        seen = folder / base if base.startswith(".") else base
        config = {**config, "base_model_name_or_path": name_for_file(str(seen), out)}
    save_file(tensors, place / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_text_atomically(place / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))


def _write_gguf(
    settings: ExportSettings, config: dict[str, Any], tensors: dict[str, Tensor], out: Path
) -> None:
    from transformers import AutoConfig

    opened = _find(settings)
    options = {} if opened.gguf_file is None else {"gguf_file": opened.gguf_file}
    try:
        base = AutoConfig.from_pretrained(opened.folder, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        dtype = DTYPES[settings.dtype or "float32"]
        write_gguf(out, base.get_text_config(), config, tensors, dtype, out.stem)
    except ImportError:
        raise UserError("--to gguf needs the package 'gguf': pip install gguf") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--to gguf: {first_line(error)}") from error


def _how(settings: ExportSettings, config: dict[str, Any], out: Path) -> str:
    """The command that serves what was written."""
    place = shlex.quote(str(out))
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    rank = next((r for r in _VLLM_RANKS if r >= max(ranks)), max(ranks))
    if settings.to == "vllm":
        return f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules name={place}"
    if settings.to == "sglang":
        return f"python -m sglang.launch_server --model-path BASE --lora-paths name={place}"
    return f"llama-cli -m BASE.gguf --lora {place}"
