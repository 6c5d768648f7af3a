"""Opening of trained adapters: finding their base model, and loading both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..auto import add_tokens_of
from ..checkpoint.base_file import gguf_file_in
from ..configs.base import PeftConfig
from ..model.base import PeftModel
from ..utils.constants import CONFIG_NAME, TOKENIZER_CONFIG_NAME
from . import resume
from .errors import UserError, first_line
from .modelio import AUTO_CLASSES, load_model, load_tokenizer, locate_model
from .ranks import on_cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Opened:
    """What the options of a command name: adapters, their base model and its task.

    ``folder`` and ``gguf_file`` are as in :func:`.modelio.locate_model`.
    """

    adapters: dict[str, str]  # {name: folder or name on the hub}
    configs: dict[str, PeftConfig]
    folder: str
    gguf_file: str | None
    task: str

    @property
    def first(self) -> str:
        """The name of the adapter that was given first."""
        return next(iter(self.adapters))


def find(adapters: list[str], model: str | None, gguf_file: str | None) -> Opened:
    """Read the configurations of ``--adapter`` values, and find their base model.

    ``--model`` is the base model when it is given; else the one that the configurations name, or
    that the run in the adapter's folder was started with. UserError when there is none, or several.
    """
    named = names_of(adapters)
    configs = {name: _config(path) for name, path in named.items()}
    tasks = {str(config.task_type or "CAUSAL_LM").lower() for config in configs.values()}
    if len(tasks) > 1:
        raise UserError(f"the adapters are for several tasks: {', '.join(sorted(tasks))}")
    task = tasks.pop()
    if task not in AUTO_CLASSES:
        raise UserError(f"the task {task} is none of {', '.join(AUTO_CLASSES)}")
    if model is not None:
        return Opened(named, configs, *locate_model(model, gguf_file), task)
    bases = {name: _base(path, configs[name]) for name, path in named.items()}
    places = {base for base in bases.values() if base is not None}
    if not places:
        raise UserError(
            f"--adapter {adapters[0]}: its configuration names no base model that is here; "
            "give --model"
        )
    if len(places) > 1:
        said = ", ".join(f"{name}: {base[0]}" for name, base in bases.items() if base)
        raise UserError(f"the adapters have several base models ({said}); give --model")
    folder, file = places.pop()
    return Opened(named, configs, *locate_model(folder, gguf_file or file), task)


def names_of(adapters: list[str]) -> dict[str, str]:
    """{name: place} of ``--adapter`` values: "name=place", or a place named by its last part."""
    found: dict[str, str] = {}
    for given in adapters:
        name, equals, place = given.partition("=")
        if not equals:
            name, place = Path(given).resolve().name.replace(".", "_"), given
        if not name or not place:
            raise UserError(f"--adapter {given}: must be a folder, or name=folder")
        if "." in name:
            raise UserError(f"--adapter {given}: a name has no dots")
        if name in found:
            raise UserError(f"--adapter {given}: the name {name} is taken; give name=folder")
        found[name] = place
    if not found:
        raise UserError("--adapter is missing: a folder, or name=folder")
    return found


def _config(place: str) -> PeftConfig:
    path = Path(place)
    if path.is_file():
        raise UserError(f"--adapter {place}: must be a folder")
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise UserError(f"--adapter {place}: the folder holds no {CONFIG_NAME}")
    if not path.is_dir() and (place.count("/") != 1 or path.parent.is_dir()):
        raise UserError(f"--adapter {place}: no such folder")
    try:
        return PeftConfig.from_pretrained(place)
    except (ValueError, OSError) as error:
        raise UserError(f"--adapter {place}: {first_line(error)}") from error


def _base(place: str, config: PeftConfig) -> tuple[str, str | None] | None:
    """(base model, GGUF file) that an adapter names, or None when they are not here."""
    try:
        file = gguf_file_in(config.auto_mapping)
    except ValueError as error:
        raise UserError(f"--adapter {place}: {first_line(error)}") from error
    name = config.base_model_name_or_path
    if name and (Path(name).exists() or not name.startswith(".")):
        return name, file
    record = Path(place) / resume.FINISHED
    if record.is_file():  # `peftkern train` notes where its model was
        model = json.loads(record.read_text()).get("identity", {}).get("model")
        if isinstance(model, str) and Path(model).exists():
            return model, file
    return None


def dtype_of(name: str | None, cpu: bool, usual: Any = None) -> Any:
    """The dtype that ``--dtype`` names; without one ``usual``, else the one the device is best at.

    That is bfloat16 on a GPU that has it, else float32.
    """
    if name is not None:
        return DTYPES[name]
    if usual is not None:
        return usual
    gpu = torch.cuda.is_available() and not on_cpu(cpu)
    return torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32


def open_model(
    opened: Opened, dtype: Any, load_in: str | None = None, cpu: bool = False
) -> PeftModel:
    """The base model with all adapters in it, in evaluation mode; the first one is active.

    UserError when one of them cannot be loaded.
    """
    gpu = torch.cuda.is_available() and not on_cpu(cpu)
    device = "cuda" if gpu else "cpu"
    base = load_model(opened.folder, opened.task, opened.gguf_file, None, dtype, load_in, device)
    model: PeftModel | None = None
    for name, place in opened.adapters.items():
        try:
            if model is None:
                add_tokens_of(base, place, {}, False)
                model = PeftModel.from_pretrained(base, place, adapter_name=name)
            else:
                model.load_adapter(place, name)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise UserError(f"--adapter {place}: {first_line(error)}") from error
    assert model is not None
    return (model if load_in else model.to(device)).eval()


def open_tokenizer(opened: Opened) -> Any:
    """The tokenizer beside the first adapter that has one, else the base model's."""
    for place in opened.adapters.values():
        if (Path(place) / TOKENIZER_CONFIG_NAME).is_file():
            return load_tokenizer(place)
    return load_tokenizer(opened.folder, opened.gguf_file)
