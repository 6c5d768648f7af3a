"""The layers and files of methods that use data before a model is adapted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....configs.lora import LoraConfig
from ....files.atomic import write_atomically
from ....ops.bases.formats import is_packed
from ...targets import TargetMatcher, resolve_targets


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def linear_targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, Any]]:
    """(name, layer) of the linear layers that ``config`` names, in the model's order.

    Quantised ones are among them, of any class, for the caller to refuse.
    """
    matcher = TargetMatcher(config, resolve_targets(config, model))
    return [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, Conv1D)) or is_packed(module)) and matcher(name)
    ]


def has_content(path: str | os.PathLike[str] | None) -> bool:
    """True when ``path`` is a file that is not empty."""
    return path is not None and os.path.isfile(path) and os.path.getsize(path) > 0


def load_tensors(
    path: str | os.PathLike[str], device: torch.device, names: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, {name: tensor}.

    Args:
        path: the file.
        device: where the tensors go.
        names: the tensors that it must have; others may stand beside them.

    Raises:
        ValueError: another kind of file (HF PEFT's caches are pickles, which could run code and
            are not read), or a name that is not in it.
    """
    try:
        found = load_file(os.fspath(path), device=str(device))
    except SafetensorError as exc:
        raise ValueError(
            f"{os.fspath(path)} is not a safetensors file ({exc}); a cache that HF PEFT wrote is a "
            "pickle and is not read: delete it, and it is made anew"
        ) from exc
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{os.fspath(path)} has no {missing[0]!r} ({len(missing)} names are missing): it was "
            "made for another model or other target modules; delete it, and it is made anew"
        )
    return found


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` to a safetensors file, atomically; makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, lambda tmp: save_file(data, tmp))
