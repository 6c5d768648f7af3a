"""The file of a base model that was read from GGUF: an adapter's configuration names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers

KEY = "gguf_file"  # in `auto_mapping`, of which HF PEFT reads two other keys


def note_gguf(model: Any, gguf_file: str | None) -> Any:
    """Note on a model that it was read from this file; returns the model.

    transformers keeps the name only of a model whose weights stay packed.
    """
    if gguf_file is not None:
        model.__dict__[KEY] = gguf_file
    return model


def gguf_file_of(model: Any, mapping: Any = None) -> str | None:
    """The name of the GGUF file of a transformers model, inside its ``name_or_path``; or None.

    ``mapping`` is the ``auto_mapping`` of an adapter's configuration, which may name it.
    """
    if named := gguf_file_in(mapping):
        return named
    quantisation = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(quantisation, dict):
        quantisation = getattr(quantisation, "__dict__", {})
    found = model.__dict__.get(KEY) or quantisation.get(KEY)
    if isinstance(found, str):
        return os.path.basename(found) if os.path.isabs(found) else found
    name = model.__dict__.get("name_or_path")
    if not name or not os.path.isdir(name) or os.path.isfile(os.path.join(name, "config.json")):
        return None
    files = sorted(path.name for path in Path(name).glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def gguf_file_in(mapping: Any) -> str | None:
    """The GGUF file that an ``auto_mapping`` names.

    Raises:
        ValueError: it is no name of a file inside the base model's folder or repository.
    """
    found = mapping.get(KEY) if isinstance(mapping, dict) else None
    if found is None:
        return None
    parts = found.replace("\\", "/").split("/") if isinstance(found, str) else [".."]
    if os.path.isabs(str(found)) or ".." in parts or not str(found).endswith(".gguf"):
        raise ValueError(
            f"`auto_mapping` of the adapter's configuration names the GGUF file {found!r}; it must "
            "be a .gguf file inside the base model's folder or repository"
        )
    return str(found)


def options_for(gguf_file: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` needs besides ``given`` to read the base model from this file.

    Weights that stay packed can neither be adapted nor saved, so they are unpacked unless the
    caller gives a quantisation himself.
    """
    if gguf_file is None:
        return {}
    options: dict[str, Any] = {KEY: gguf_file}
    config = getattr(transformers, "GgufConfig", None)  # of newer versions
    if config is not None and "quantization_config" not in given:
        options["quantization_config"] = config(dequantize=True)
    return options
