"""The files of adapters: written under a temporary name, and renamed."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
import transformers
from torch import Tensor

from ..configs.base import PeftConfig
from ..files.atomic import replaced_together, write_atomically
from ..tuners.lora.plain import as_plain_lora
from ..tuners.wrapped import Adapted, innermost
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.peft_types import TaskType
from .base_file import KEY, gguf_file_of
from .serving import Adapter, refused_by_servers
from .state_dicts import load_peft_weights

log = logging.getLogger("peftkern")
_TOLD: set[str] = set()  # lines that were logged


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with a storage of its own, as the safetensors format needs them."""
    seen: set[tuple[Any, ...]] = set()
    out = {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        place = (value.device, value.untyped_storage().data_ptr())
        if value.numel() and place in seen:
            value = value.clone()
        seen.add((value.device, value.untyped_storage().data_ptr()))
        out[key] = value
    return out


def _write_weights(path: str, tensors: dict[str, Tensor]) -> None:
    """Write safetensors, or a torch pickle of tensors when ``path`` has another extension."""

    def write(tmp: str) -> None:
        if path.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(tensors, tmp, metadata={"format": "pt"})
        else:
            torch.save(tensors, tmp)

    write_atomically(path, write)


def _save_config(model: Adapted, config: PeftConfig, staged: str, folder: str) -> None:
    """Write the configuration into ``staged``; it will be in ``folder``."""
    base = innermost(model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    mapping = None
    if config.task_type is None:
        mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    if gguf_file := gguf_file_of(base, config.auto_mapping):
        mapping = {**(mapping or config.auto_mapping or {}), KEY: gguf_file}
    saved = copy.copy(config)  # another thread may use or save the model's own
    saved.inference_mode = True
    saved.save_pretrained(staged, auto_mapping_dict=mapping, seen_from=folder)


def write_adapters(
    model: Any,
    save_directory: str | os.PathLike[str],
    names: list[str],
    tensors: dict[str, dict[str, Tensor]],
    safe_serialization: bool,
    start_folder: str | None,
) -> None:
    """Write the files of adapters with these tensors, as ``save_pretrained`` does.

    Args:
        model: the PeftModel.
        save_directory: folder, made when missing.
        names: the adapters.
        tensors: {adapter: {name in the file: tensor}}.
        safe_serialization, start_folder: as in ``save_pretrained``.
    """
    configs = {name: model.peft_config[name] for name in names}
    if start_folder is not None:
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is "
                f"not supported for {model.peft_type.value}."
            )
        start = load_peft_weights(start_folder)
        for name in names:
            configs[name], tensors[name] = as_plain_lora(configs[name], tensors[name], start)
    written, other = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    if not safe_serialization:
        written, other = other, written
    os.makedirs(save_directory, exist_ok=True)
    for name, found in tensors.items():
        folder = (
            os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
        )
        os.makedirs(folder, exist_ok=True)
        # weights and configuration are replaced together, as they belong together
        with replaced_together(folder, without=[other]) as staged:
            _write_weights(os.path.join(staged, written), _without_aliases(found))
            _save_config(model, configs[name], staged, folder)
    model.create_or_update_model_card(save_directory)
    for name, found in tensors.items():
        _tell_of_servers(model, configs[name], found)


def _tell_of_servers(model: Any, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Log one line, once, when vLLM or SGLang would refuse the adapter or read it wrongly.

    It is for adapters of the tasks that they serve.
    """
    served = config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS)
    if not served or not isinstance(innermost(model), transformers.PreTrainedModel):
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    line = refused_by_servers(Adapter(config.to_dict(), shapes))
    if line is not None and line not in _TOLD:
        _TOLD.add(line)
        log.warning("The adapter as saved is %s", line)
