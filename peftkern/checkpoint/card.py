"""The README of a saved adapter, as the hub expects it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._version import PEFT_COMPAT_VERSION, __version__
from ..files.atomic import write_text_atomically
from ..files.base_names import is_place, name_for_file, public_name
from ..tuners.base_layer import get_model_config
from ..tuners.wrapped import innermost
from ..utils.constants import DUMMY_MODEL_CONFIG
from ..utils.peft_types import PeftType, TaskType
from ..utils.private import NAME_KEY
from .base_file import gguf_file_of

_VERSIONS = "### Framework versions"
_QUANTISED = "The base model was quantised with this configuration:"


def card_tags(model: Any) -> list[str]:
    """The card's tags, sorted: the base model's, the method, the base model's name, the library."""
    import transformers

    base = innermost(model)
    tags = {"peftkern", *(getattr(base, "model_tags", None) or [])}
    if isinstance(base, transformers.PreTrainedModel):
        tags.add("transformers")
    if any(config.peft_type == PeftType.LORA for config in model.peft_config.values()):
        tags.add("lora")
    name = getattr(base, "name_or_path", None)
    if name and not is_place(name):
        tags.add(f"base_model:adapter:{public_name(name)}")
    return sorted(tags)


_FOR_THE_AUTHOR = (
    ("What it is for", "the task it was trained for, and what it should not be used for"),
    ("Training data", "where it comes from, its size and licence, how it was filtered and split"),
    ("Training", "steps, batch size, learning rate and schedule, precision, hardware, hours"),
    ("Evaluation", "metrics on held-out data beside those of the base model alone"),
    ("Limits", "languages, biases and failures that are known"),
)


def _settings(config: Any) -> Iterator[str]:
    """The main settings of an adapter's configuration, as list items for the card."""
    names = "r lora_alpha lora_dropout target_modules target_parameters num_virtual_tokens"
    for name in names.split():
        if value := getattr(config, name, None):
            shown = ", ".join(sorted(value)) if isinstance(value, (set, list)) else value
            yield f"- `{name}`: {shown}"


def _new_text(model: Any, folder: str | os.PathLike[str]) -> str:
    """The text of a new card: known facts, code to load the adapter, and headings to fill in.

    The code runs in ``folder``, where the card is.
    """
    config = model.active_peft_config
    base = innermost(model)
    name = getattr(base, "name_or_path", None)
    known = public_name(name) if name else "the base model"
    method = PeftType(config.peft_type).value.replace("_", " ").lower()
    auto = _auto_class(model)
    load = [f"from transformers import {auto}"] if auto else []
    given = f'"{name_for_file(name, folder) if name else known}"'
    file = gguf_file_of(base, config.auto_mapping)
    if file:
        given += f', gguf_file="{file}"'
    made = f"{auto}.from_pretrained({given})" if auto else f"...  # {given}"
    if auto and name and is_place(name):
        made += "  # as seen from this folder"
    here = "." if "default" in model.peft_config else f"./{model.active_adapter}"
    lines = [
        *("# Adapter", ""),
        f"An adapter ({method}) for `{known}`{f' ({file})' if file else ''}, trained and saved",
        "with peftkern. It has HF PEFT's format: whatever loads adapters of HF PEFT loads it.",
        *("", "## Configuration", "", *_settings(config)),
        *("", "## How to load it", "", "```python"),
        *load,
        "from peftkern import PeftModel  # or: from peft import PeftModel",
        "",
        f"model = {made}",
        f'model = PeftModel.from_pretrained(model, "{here}")  # this folder, or the repository',
        "```",
    ]
    for heading, what in _FOR_THE_AUTHOR:
        lines += ["", f"## {heading}", "", f"[To be written by the author: {what}.]"]
    return "\n".join(lines) + "\n"


def _auto_class(model: Any) -> str | None:
    """The name of the transformers class that loads the base model; None for other libraries."""
    import transformers

    if not isinstance(innermost(model), transformers.PreTrainedModel):
        return None
    task = type(model).__name__.removeprefix("PeftModel").removeprefix("For")
    return "AutoModel" if task in ("", "FeatureExtraction") else f"AutoModelFor{task}"


def create_or_update_model_card(model: Any, output_dir: str | os.PathLike[str]) -> None:
    """Write ``README.md`` into ``output_dir``, or update the one that is there.

    ``library_name`` stays "peft", because HF PEFT and every tool made for it can load the adapter.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(output_dir) / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        header = ModelCardData().to_yaml()
        card = ModelCard(f"---\n{header}\n---\n\n{_new_text(model, output_dir)}")
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *card_tags(model)})
    tasks = [adapter.task_type for adapter in model.peft_config.values()]
    if TaskType.CAUSAL_LM in tasks and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    config = get_model_config(innermost(model))
    name = config.get(NAME_KEY) if config != DUMMY_MODEL_CONFIG else None
    if name and not is_place(name):
        card.data["base_model"] = public_name(name)
    lines = card.text.splitlines()
    quantisation = config.get("quantization_config")
    if quantisation and _QUANTISED not in lines:
        lines += ["", "## Training procedure", "", _QUANTISED, ""]
        lines += [
            f"- {name}: {public_name(value) if isinstance(value, str) else value}"
            for name, value in quantisation.items()
        ]
    versions = [f"- PEFT {PEFT_COMPAT_VERSION}", f"- peftkern {__version__}"]
    if _VERSIONS not in lines:
        lines += ["", _VERSIONS, ""]
    at = lines.index(_VERSIONS) + 2
    lines[at:at] = [line for line in versions if line not in lines]
    card.text = "\n".join(lines)
    write_text_atomically(path, str(card))
