"""Loading of saved tensors into an adapter: all names and shapes are checked before any copy."""

from __future__ import annotations

import warnings
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from ..tuners.base_layer import BaseTunerLayer, adapter_modules
from ..tuners.lora.fused_experts import convert_weights, numbers_of_experts
from ..tuners.lora.tying import tie_again
from ..utils.gathering import is_shard
from ..utils.shards import part_like, whole
from .base_tensors import Beside, find_beside
from .shards import copy_whole
from .slots import PREFIX, Slot, clean, slots_to_save, tensors_of


class LoadResult(namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])):
    """torch's result of loading, with names as in the model.

    ``mismatched_keys`` lists tensors that were left out because of their shape, as (name, shape in
    the file, shape in the model).
    """

    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def few(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Match(namedtuple("Match", "pairs missing unexpected mismatched passed why")):
    """Saved tensors matched with slots.

    ``pairs`` [(slot, tensor)]; ``missing``: slots without a tensor; ``unexpected``: names on disk
    without a slot; ``mismatched`` [(slot, name on disk, shape in the file, shape in the model)];
    ``passed``: known names that need no slot; ``why``: sentences about experts that do not fit.
    """


def match_weights(model: Any, weights: dict[str, Tensor], adapter_name: str) -> Match:
    """Find the slot of every saved tensor; nothing is changed.

    A tensor may be named as in a file or as in the model, where names contain the adapter's name.
    There are slots for the adapter's tensors, for biases that its configuration trains, and for
    embeddings, see :func:`find_beside`.

    Raises:
        ValueError: an unknown adapter, or one without tensors; a slot that takes no saved tensor;
            embeddings that would change the outputs of other adapters.
    """
    slots = {slot.key.removeprefix(PREFIX): slot for slot in slots_to_save(model, adapter_name)}
    config = model.peft_config[adapter_name]
    in_model = {
        key.removeprefix(PREFIX): slot
        for slot in slots.values()
        for key in slot.model_keys
        if key == clean(slot.model_key)  # not for a prompt, whose keys are its encoder's weights
    }
    why: list[str] = []
    weights = convert_weights(model, weights, {*slots, *in_model}, why)
    missing = dict(slots)
    pairs, unexpected, mismatched, passed = [], [], [], []
    beside: Beside | None = None
    for key, value in weights.items():
        short = clean(key).removeprefix(PREFIX)
        slot = slots.get(short) or in_model.get(short)
        again = slot is not None and missing.pop(slot.key.removeprefix(PREFIX), None) is None
        if slot is None or again:
            beside = beside or find_beside(model, config, slots.values())
            if short in beside.twice:
                passed.append(clean(key))
                continue
            slot = None if again else beside.biases.get(short)
            if slot is None and not again and beside.has_embedding(short, weights):
                slot = beside.embeddings[short]
                check_shared(model, adapter_name, slot, key, value)
        if slot is None:
            unexpected.append(key)
        elif slot.refuses:
            raise ValueError(slot.refuses)
        elif slot.tensor.shape != value.shape:
            mismatched.append((slot, key, tuple(value.shape), tuple(slot.tensor.shape)))
        else:
            pairs.append((slot, value))
    why += numbers_of_experts(model, adapter_name, mismatched)
    return Match(pairs, list(missing.values()), unexpected, mismatched, passed, why)


def check_shared(model: Any, adapter_name: str, slot: Slot, key: str, value: Tensor) -> None:
    """Raise a ValueError when an embedding in a file would change the outputs of other adapters."""
    others = sorted(name for name in getattr(model, "peft_config", {}) if name != adapter_name)
    here = slot.tensor
    if not others or here.is_meta or here.shape != value.shape:
        return
    if not torch.equal(now := whole(here), value.to(now)):
        raise ValueError(
            f"The embedding {key!r} differs from the base model's, which the "
            f"adapters {others} use as well. Load {adapter_name!r} into a model of its own."
        )


def check_keys(match: Match, adapter_name: str, source: str, config: Any) -> None:
    """Raise one ValueError, naming the source, when a file lacks keys or has unknown ones."""
    said = []
    if match.missing:
        said.append(f"missing keys: {few([slot.key for slot in match.missing])}")
    if match.unexpected:
        said.append(f"unexpected keys: {few(match.unexpected)}")
    if said:
        raise ValueError(
            f"The weights in {source} do not fit the adapter {adapter_name!r} that its "
            "configuration describes: "
            + "; ".join(said)
            + ". "
            + "".join(f"{sentence}. " for sentence in match.why[:3])
            + (
                "HF PEFT's `ensure_weight_tying` leaves modules untied that are tied here, and "
                "saves none of theirs: for the model that it trained, load the configuration, set "
                "`ensure_weight_tying` to False in it, and pass it as `config`."
                if _lacks_only_tied(match, config)
                else "Is it for another base model, or from an incomplete copy?"
            )
        )


def _lacks_only_tied(match: Match, config: Any) -> bool:
    """True when a file lacks only tensors that ``ensure_weight_tying`` ties to the embedding's."""
    tied: set[str] = set(getattr(config, "modules_to_tie", None) or ())
    tied |= set(getattr(config, "target_modules_to_tie", None) or ())
    places = tuple(f"{PREFIX}{name}." for name in tied)
    return not match.unexpected and all(slot.key.startswith(places) for slot in match.missing)


def check_shapes(match: Match) -> None:
    """Raise one RuntimeError that names every tensor whose shape is not the model's."""
    if match.mismatched:
        raise RuntimeError(
            "Error(s) in loading the adapter:\n\t"
            + "\n\t".join(
                f"size mismatch for {key}: copying a param with shape {saved} from checkpoint, the "
                f"shape in current model is {here}."
                for _, key, saved, here in match.mismatched
            )
            + "".join(f"\n\t{sentence}." for sentence in match.why[:3])
        )


def insert_adapter_name(key: str, adapter_name: str, prefix: str = "lora_") -> str:
    """The name in the model of a name on disk: "x.lora_A.<name>.weight" for "x.lora_A.weight"."""
    head, found, tail = key.rpartition(prefix)
    if not found:
        return key
    attribute, dot, rest = tail.partition(".")
    return f"{head}{prefix}{attribute}.{adapter_name}{dot}{rest}"


def _insert_adapter_name_into_state_dict(
    state_dict: dict[str, Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, Tensor]:
    """A saved state dict with its tensors' names in the model."""
    return {
        insert_adapter_name(key, adapter_name, parameter_prefix): value
        for key, value in state_dict.items()
    }


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy saved tensors into an adapter; all shapes are checked before the first copy.

    Args:
        model: a PeftModel, or a model with injected adapters.
        peft_model_state_dict: names as on disk (with or without ``base_model.model.``); the dict
            itself is not changed.
        adapter_name: the adapter to fill; its name may differ from that when it was saved.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
        low_cpu_mem_usage: use the given tensors themselves instead of copying them (needed for
            adapters on the meta device).

    Returns:
        torch's result of loading: ``missing_keys``, every name of the model that was not given
        (the base model's too), and ``unexpected_keys``; also ``mismatched_keys``.

    Raises:
        ValueError: an unknown adapter, or the model holds no tensors of it.
        RuntimeError: a tensor's shape is not the model's.
    """
    match = match_weights(model, peft_model_state_dict, adapter_name)
    result = fill(model, match, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
    given = {slot.model_key.removeprefix(".") for slot, _ in match.pairs}
    known = given.union(result.missing_keys, (name for name, _, _ in result.mismatched_keys))
    names = (key.removeprefix(".") for key, _, _ in tensors_of(model, ""))
    missing = result.missing_keys + [
        name for name in names if name not in known and clean(name) not in match.passed
    ]
    whole = LoadResult(missing, result.unexpected_keys)
    whole.mismatched_keys = result.mismatched_keys
    return whole


def fill(
    model: Any,
    match: Match,
    adapter_name: str,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy matched tensors into the adapter: the second half of :func:`set_peft_model_state_dict`.

    ``missing_keys`` has only names of this adapter.
    """
    wrong = [(slot.model_key, saved, here) for slot, _, saved, here in match.mismatched]
    if not ignore_mismatched_sizes:
        check_shapes(match)
    if wrong:
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model "
            "checkpoint and are being ignored because you passed `ignore_mismatched_sizes=True`: "
            + "\n".join(
                f"- {key}: found shape {saved} in the checkpoint and {here} in the model "
                "instantiated"
                for key, saved, here in wrong
            ),
            stacklevel=3,
        )
    with torch.no_grad():
        for slot, value in match.pairs:
            target = slot.tensor
            # a base weight is always copied into, as another module may share it, and a DTensor, as
            # FSDP2 gathers from the memory that it found in its first forward
            copied = slot.in_base or is_shard(target)
            if target.is_meta or (low_cpu_mem_usage and not copied):
                slot.assign(part_like(target, value.to(target.dtype)))
            else:
                copy_whole(target, value)
    if low_cpu_mem_usage:
        for module in adapter_modules(model):
            if isinstance(module, BaseTunerLayer):
                module.move_adapter_to_base_layer(adapter_name)
        tie_again(model, adapter_name)
    result = LoadResult(
        [slot.model_key for slot in match.missing],
        [insert_adapter_name(key, adapter_name) for key in match.unexpected],
    )
    result.mismatched_keys = wrong
    return result
