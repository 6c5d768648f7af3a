"""Adapter checkpoints with HF PEFT's keys and files; all checks come before a weight is changed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..files.atomic import read_whole
from ..files.hub import locate_file
from ..tuners.targets import targets_embedding
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.device import infer_device
from ..utils.private import uncompiled
from ..utils.shards import whole
from ..utils.warning import PeftWarning
from .base_tensors import bias_slots, embedding_slots, unmerged
from .loading import few
from .shards import sharing
from .slots import HOW_TO_GATHER, PREFIX, Slot, adapter_slots, clean, slots_to_save, tensors_of


def _vocabulary_was_resized(model: Any, config: Any) -> bool:
    """True when the base model's config.json, if this machine has it, has another vocab_size."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    model_id = getattr(config, "base_model_name_or_path", None)
    if not size or not model_id:
        return False
    try:
        file = locate_file(model_id, "config.json", local_files_only=True)
    except (OSError, ValueError):
        file = None
    if file is None:
        return False
    return bool(type(model.config).from_pretrained(os.path.dirname(file)).vocab_size != size)


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors by their names on disk, which do not contain the adapter's name.

    Args:
        model: a PeftModel, or a model with injected adapters.
        state_dict: take the tensors from it (names as in ``model.state_dict()``); None: from the
            model.
        adapter_name: the adapter.
        unwrap_compiled: take the model out of the wrapper of ``torch.compile``.
        save_embedding_layers: add the embeddings' own weights; "auto" does so when they are adapted
            or when the vocabulary was resized.

    Tensors that processes share out (DTensors) are gathered: every process must call.

    Raises:
        ValueError: an unknown adapter, or the model holds no tensors of it (it was merged or
            unloaded, or belongs to HF PEFT).
    """
    if unwrap_compiled:
        model = uncompiled(model)
    slots = slots_to_save(model, adapter_name)
    config = model.peft_config[adapter_name]
    inferred = state_dict is None
    given = state_dict_of(model) if state_dict is None else state_dict
    if given is not None:
        given = {clean(key): value for key, value in given.items()}
    found = _tensors_for_file(model, slots, given, adapter_name, inferred)
    if inferred:
        _warn_of_shards(found, adapter_name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    targeted = targets_embedding(config, base)
    if save_embedding_layers == "auto":
        save_embedding_layers = False
        # training single tokens is meant to give a small file, without the whole vocabulary
        if targeted and getattr(config, "trainable_token_indices", None) is None:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in "
                "`target_modules`.",
                stacklevel=2,
            )
            save_embedding_layers = True
        elif _vocabulary_was_resized(model, config):
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as the embedding layer has been "
                "resized during finetuning.",
                stacklevel=2,
            )
            save_embedding_layers = True
    biases = [clean(slot.key) for slot in bias_slots(model, config)]
    embeddings: list[Slot] = []
    if save_embedding_layers and hasattr(model, "get_input_embeddings"):
        embeddings = list(embedding_slots(model, targeted))
    elif save_embedding_layers:
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers "
            "model.",
            stacklevel=2,
        )
    if biases or embeddings:
        own = dict(named_tensors(model)) if given is None or inferred else {}
        full = own if given is None else {**own, **given}
        if absent := [key for key in biases if key not in full]:
            raise _lacks(absent, adapter_name)
        found.update({key: full[key] for key in biases})
        if getattr(config, "bias", None) == "all":
            # HF PEFT's files hold the bias of a fully trained module twice, under this name too
            at = f".modules_to_save.{adapter_name}."
            for slot in slots:
                if at in slot.model_key and slot.model_key.endswith(".bias"):
                    found[clean(slot.model_key).replace(at, ".modules_to_save.")] = found[slot.key]
        plain = unmerged(model, embeddings)
        for slot in embeddings:
            value = full.get(clean(slot.key))
            # saved with merged adapters, these would count twice after loading
            if slot.key in plain and value is not None:
                now, value = whole(slot.tensor), whole(value)
                value = whole(plain[slot.key]) if torch.equal(value.to(now), now) else value
            if value is not None:
                found[clean(slot.key)] = value
    return {key: whole(value) for key, value in found.items()} if sharing(found.values()) else found


def _tensors_for_file(
    model: nn.Module,
    slots: list[Slot],
    given: dict[str, Tensor] | None,
    adapter_name: str,
    inferred: bool,
) -> dict[str, Tensor]:
    """{name in the file: tensor} of every slot.

    A tensor is taken from ``given`` by its name in the model, else by its name in a file (a dict
    that this function made before), else from the model, if ``given`` is the model's own
    (``inferred``).

    Raises:
        ValueError: ``given`` is the caller's and has neither name.
    """
    if given is None:
        return {slot.key: slot.saved(None) for slot in slots}
    # a name on disk contains no adapter's name, so it is used only if the model has one adapter, or
    # if the caller gave the state dict for this adapter
    nameless = not inferred or len(model.peft_config) == 1  # type: ignore[arg-type]
    found, absent = {}, []
    for slot in slots:
        missing = [key for key in slot.model_keys if key not in given]
        if not missing:
            found[slot.key] = slot.saved(given)
        elif nameless and slot.key in given:
            found[slot.key] = given[slot.key].detach()
        elif inferred:
            found[slot.key] = slot.saved(None)
        else:
            absent += missing
    if absent:
        raise _lacks(absent, adapter_name)
    return found


def check_named(model: nn.Module, state_dict: dict[str, Tensor], names: list[str]) -> None:
    """Raise a ValueError unless ``state_dict`` has all tensors of these adapters by model names."""
    given = {clean(key) for key in state_dict}
    for name in names:
        keys = (key for slot in adapter_slots(model, name) for key in slot.model_keys)
        if absent := [key for key in keys if key not in given]:
            raise ValueError(
                f"{_lacks(absent, name)}. Of one that is not named after its adapter, as in what "
                "`get_peft_model_state_dict` returns, it cannot be told which of "
                f"{names} it belongs to: pass `selected_adapters` with one name."
            )


def _lacks(names: list[str], adapter_name: str) -> ValueError:
    return ValueError(f"`state_dict` lacks tensors of {adapter_name!r}: {few(names)}")


def state_dict_of(model: nn.Module) -> dict[str, Tensor] | None:
    """``model.state_dict()`` if it may differ from the modules' tensors, else None.

    With FSDP it gathers shards, so every process must call it.
    """
    return model.state_dict() if has_own_state_dict(model) else None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the modules' tensors, as in torch's own ``model.state_dict()``."""
    for name, owner, attribute in tensors_of(model, ""):
        yield clean(name.removeprefix(".")), Slot(name, name, owner, attribute).tensor.detach()


def check_whole(tensors: dict[str, Tensor], adapter_name: str, given: bool) -> None:
    """Refuse to save parts of tensors.

    Args:
        tensors: the adapter's tensors by their names in the file.
        adapter_name: the adapter.
        given: True when they come from a state dict of the caller.

    Raises:
        ValueError: a tensor is empty, like a parameter that ZeRO-3 has sharded and nobody gathered;
            or a LoRA matrix in a caller's state dict has fewer than 2 dimensions. (For the model's
            own, the latter is a warning, as in HF PEFT.)
    """
    flat = {key for key, _ in _flat(tensors)}
    bad = [
        key
        for key, value in tensors.items()
        if key in flat and (given or not value.numel()) or value.dim() < 2 and not value.numel()
    ]
    if bad:
        raise ValueError(
            f"{'`state_dict` holds' if given else 'the model holds'} only parts of "
            f"{adapter_name!r}: {few([f'{k} {tuple(tensors[k].shape)}' for k in bad])}. "
            f"{HOW_TO_GATHER}. Nothing was written."
        )


def _flat(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of LoRA matrices that are empty or have fewer than 2 dimensions."""
    return [
        (key, tuple(value.shape))
        for key, value in tensors.items()
        if (".lora_A" in key or ".lora_B" in key)
        and not key.endswith(".bias")
        and (value.dim() < 2 or not value.numel())
    ]


def has_own_state_dict(model: nn.Module) -> bool:
    """True when ``model.state_dict()`` may differ from the modules' tensors.

    It is overridden, or has hooks, as those with which FSDP gathers shards.
    """
    replaced = "state_dict" in model.__dict__ or type(model).state_dict is not nn.Module.state_dict
    return replaced or any(m._state_dict_hooks or m._state_dict_pre_hooks for m in model.modules())


def _warn_of_shards(tensors: dict[str, Tensor], adapter_name: str) -> None:
    """Warn of LoRA matrices that are empty or flat, as one process's part of a sharded one is."""
    bad = _flat(tensors)
    if bad:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: "
            f"{few([f'{key}:{shape}' for key, shape in bad])}. This is what DeepSpeed ZeRO-3 / "
            "FSDP shards look like that were not gathered: what is saved is incomplete. Gather the "
            "parameters (deepspeed.zero.GatheredParameters, or summon_full_params of FSDP) around "
            "the call that saves.",
            PeftWarning,
            stacklevel=3,
        )


# -------------------------------------------------------------------- reading files


def read_weights_file(path: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of an adapter file, {name: tensor}.

    The file is ``.safetensors`` or a torch pickle, of which only tensors are read and no code runs.

    Raises:
        ValueError: the file is truncated, has another format than its name says, holds no dict of
            tensors, or a tensor with NaN or infinity. The message names the file and the key.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path, device=str(device))
        else:
            weights = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as exc:  # safetensors, zip and unpickling errors share no base class
        kind = "safetensors file" if path.endswith(".safetensors") else "file of tensors alone"
        raise ValueError(f"{path} is truncated, damaged or no {kind}: {exc}") from exc
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: key {key!r} holds a {type(value).__name__}, not a tensor")
        if value.is_floating_point() and not _all_finite(value):
            raise ValueError(f"{path}: tensor {key!r} has NaN or infinite values")
    return weights


def _all_finite(value: Tensor) -> bool:
    if value.dtype.itemsize == 1:  # torch has no reductions for float8
        value = value.float()
    # minimum and maximum are finite only when every element is; this needs no full-size temporary
    return value.numel() == 0 or bool(torch.isfinite(torch.stack(value.aminmax())).all())


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, {name: tensor}, from a local folder or the hub.

    Args:
        model_id: folder, or ``owner/name`` on the hub.
        device: device of the tensors; None: the accelerator, or the CPU.
        key_mapping: {regular expression: replacement} for names (without ``base_model.model.``).
        **hub: arguments of ``hf_hub_download`` (``subfolder``, ``revision``, ``token``, …).

    Raises:
        ValueError: the file is missing or cannot be read, see :func:`read_weights_file`.
    """
    where = os.fspath(model_id)
    device = infer_device() if device is None else device
    weights = read_whole(
        lambda: locate_file(where, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), **hub),
        lambda file: read_weights_file(file, device),
    )
    if weights is None:
        raise ValueError(
            f"Can't find weights for {where} in {where} or in the Hugging Face Hub. Please check "
            "that the file "
            f"{WEIGHTS_NAME} or {SAFETENSORS_WEIGHTS_NAME} is present at {where}."
        )
    if not key_mapping:
        return weights
    return {_map_key(key, key_mapping): value for key, value in weights.items()}


def _map_key(key: str, mapping: dict[str, str]) -> str:
    prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), "")
    name = key[len(prefix) :]
    for pattern, replacement in mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return prefix + name
