"""The README of a saved adapter, as the hub expects it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._io import write_text_atomically
from ._version import PEFT_COMPAT_VERSION, __version__
from .prompts import innermost
from .tuners.tuners_utils import get_model_config
from .utils.constants import DUMMY_MODEL_CONFIG
from .utils.peft_types import PeftType, TaskType

_VERSIONS = "### Framework versions"
_QUANTISED = "The base model was quantised with this configuration:"


def card_tags(model: Any) -> list[str]:
    """Sorted tags: the base model's own, the method, where the adapter belongs,
    and who wrote it."""
    import transformers

    base = innermost(model)
    tags = {"peftkern", *(getattr(base, "model_tags", None) or [])}
    if isinstance(base, transformers.PreTrainedModel):
        tags.add("transformers")
    if any(config.peft_type == PeftType.LORA for config in model.peft_config.values()):
        tags.add("lora")
    if getattr(base, "name_or_path", None):
        tags.add(f"base_model:adapter:{base.name_or_path}")
    return sorted(tags)


def create_or_update_model_card(model: Any, output_dir: str | os.PathLike[str]) -> None:
    """Write ``README.md`` into ``output_dir``, or bring the one that is there up to date.

    ``library_name`` stays "peft": the adapter is one that HF PEFT, and every tool made for it, can
    load.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(output_dir) / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        header = ModelCardData().to_yaml()
        card = ModelCard(f"---\n{header}\n---\n\n# Adapter\n\nTrained and saved with peftkern.\n")
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *card_tags(model)})
    tasks = [adapter.task_type for adapter in model.peft_config.values()]
    if TaskType.CAUSAL_LM in tasks and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    config = get_model_config(innermost(model))
    if config != DUMMY_MODEL_CONFIG and config.get("_name_or_path"):
        card.data["base_model"] = config["_name_or_path"]
    lines = card.text.splitlines()
    quantisation = config.get("quantization_config")
    if quantisation and _QUANTISED not in lines:
        lines += ["", "## Training procedure", "", _QUANTISED, ""]
        lines += [f"- {name}: {value}" for name, value in quantisation.items()]
    versions = [f"- PEFT {PEFT_COMPAT_VERSION}", f"- peftkern {__version__}"]
    if _VERSIONS not in lines:
        lines += ["", _VERSIONS, ""]
    at = lines.index(_VERSIONS) + 2
    lines[at:at] = [line for line in versions if line not in lines]
    card.text = "\n".join(lines)
    write_text_atomically(path, str(card))
