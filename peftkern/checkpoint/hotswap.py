"""Hot swapping: replaces the weights of a loaded LoRA adapter by another's, as HF PEFT's functions.

The tensors keep their memory and their shapes, so that a compiled model need not be compiled again.
For that :func:`prepare_model_for_compiled_hotswap` makes room for the largest rank and turns
scalings into tensors: a compiled graph reads a tensor, but contains a number as a constant.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..configs.base import PeftConfig
from ..files.hub import split_hub_kwargs
from ..tuners.base_layer import BaseTunerLayer, adapter_modules
from ..tuners.lora import LoraConfig, LoraLayer
from ..tuners.lora.linear import Linear
from ..tuners.lora.parameter import ParamWrapper
from ..tuners.lora.ranks import rank_and_alpha, scaling_of
from ..utils.device import infer_device
from ..utils.gathering import is_shard
from ..utils.peft_types import PeftType
from ..utils.places import further_names
from ..utils.private import COMPILED, is_compiled, uncompiled
from ..utils.shards import part_like
from .base_tensors import find_beside
from .loading import check_shared, insert_adapter_name
from .slots import PREFIX, Slot, adapter_slots
from .state_dicts import load_peft_weights

# settings that two adapters must have in common, as they are not swapped with the weights
CONFIG_KEYS_TO_CHECK = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"],
}
_MAGNITUDE = "lora_magnitude_vector"


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare a model to be compiled once and then get adapters of other ranks and scalings.

    Call it after the first adapter is loaded and before ``torch.compile``. The model's outputs do
    not change. Without a compiler its layers are slower afterwards, as they run the plain formula.

    Args:
        model: changed in place.
        target_rank: pad A with rows and B with columns of zeros to this rank, the largest of all
            later adapters; None: no padding.
        config: the adapters' configurations, whose ranks are set to ``target_rank``.
        check_compiled: "error", "warn" or "ignore" when the model is compiled already (it would be
            compiled again).

    Raises:
        ValueError: the model is compiled, has no LoRA layers, or has an adapter of a larger rank;
            or ranks share it out and it would be padded. It is not changed then.
    """
    if is_compiled(model):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already "
                "compiled. This will likely result in re-compilation, hurting performance. Call "
                "the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(
                "check_compiles should be one of 'error', 'warn', or 'ignore', got "
                f"'{check_compiled}' instead."
            )
    layers: list[Any] = [m for m in adapter_modules(model) if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call "
            "`prepare_model_for_compiled_hotswap` after loading the first adapter and before "
            "loading the second adapter."
        )
    padded = []
    shared = any(is_shard(p) for layer in layers for p in layer.parameters())
    if shared and target_rank is not None:
        raise ValueError(
            "prepare_model_for_compiled_hotswap cannot pad to `target_rank` in a model that ranks "
            "share out (tensor parallelism): load the first adapter with the largest rank"
        )
    if target_rank is not None:
        padded = [room for layer in layers for room in _padded(layer, target_rank)]
    for owner, weight in padded:
        owner.weight = nn.Parameter(weight, requires_grad=owner.weight.requires_grad)
        _note_sizes(owner)
    for layer in layers:
        for name, value in layer.scaling.items():
            if not isinstance(value, Tensor):
                device = next(layer.parameters()).device
                layer.scaling[name] = torch.tensor(float(value), device=device)
    if target_rank is None:
        return
    for one in config.values() if isinstance(config, dict) else filter(None, [config]):
        one.r = target_rank
        one.rank_pattern = {key: target_rank for key in one.rank_pattern}


def _padded(layer: Any, rank: int) -> list[tuple[Any, Tensor]]:
    """(module, larger weight) for A and B of a layer's adapters whose rank is below ``rank``."""
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if _interleaved(layer):
        if other := sorted(r for r in layer.r.values() if r != rank):
            raise ValueError(
                f"Trying to pad an adapter of the parameter {layer.parameter_name!r} to the target "
                f"rank {rank}, but one of rank {other[0]} cannot be padded: its factors of several "
                "experts lie in one matrix."
            )
        return []
    convolves = not isinstance(layer, Linear) and getattr(layer, "lora_A", None)
    if not isinstance(layer, Linear) and not convolves:
        return []  # embeddings are not padded, as in HF PEFT
    if convolves and rank % groups:
        raise ValueError(
            f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank {rank}, but "
            f"the target rank is not divisible by {groups}. Please choose a target rank that is "
            f"divisible by {groups}."
        )
    found: list[tuple[Any, Tensor]] = []
    for store, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
        for module in store.values():
            old = module.weight.detach()
            # the weight of a grouped convolution's B has the ranks of one group only
            per = getattr(module, "groups", 1) if dim == 1 else 1
            have = old.shape[dim] * per
            if have > rank:
                raise ValueError(
                    f"Trying to pad the adapter to the target rank {rank}, but the original rank "
                    f"is larger ({have}). This is not possible."
                )
            if have == rank:
                continue
            shape = list(old.shape)
            shape[dim] = rank // per
            found.append((module, _put_into(old.new_zeros(shape), old, dim, groups)))
    return found


def _interleaved(layer: Any) -> bool:
    """True when A and B hold the factors of several experts, so that padding is not at the end."""
    return isinstance(layer, ParamWrapper) and layer.num_experts > 1


def _put_into(room: Tensor, weight: Tensor, dim: int, groups: int) -> Tensor:
    """Copy ``weight`` to the start of ``room``, a larger tensor of zeros, and return ``room``.

    A of a grouped convolution is copied group by group, as each group of the base layer reads its
    own part of the ranks.
    """
    if dim == 1:
        room[:, : weight.shape[1]] = weight
    elif groups == 1:
        room[: weight.shape[0]] = weight
    else:
        new, old = room.shape[0] // groups, weight.shape[0] // groups
        for g in range(groups):
            room[g * new : g * new + old] = weight[g * old : (g + 1) * old]
    return room


def _note_sizes(module: Any) -> None:
    """Update the sizes that ``nn.Linear`` and convolutions keep beside their weights."""
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups


# -------------------------------------------------------------------- swapping


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise a ValueError, naming the setting, when one adapter cannot replace the other.

    A setting that differs would not be swapped with the weights.
    """
    one, other = PeftType(config0.peft_type or ""), PeftType(config1.peft_type or "")
    if one != other:
        raise ValueError(f"Incompatible PEFT types found: {one.value} and {other.value}")
    if one not in CONFIG_KEYS_TO_CHECK:
        allowed = ", ".join(kind.value for kind in CONFIG_KEYS_TO_CHECK)
        raise ValueError(f"Hotswapping only supports {allowed} but {one.value} was passed.")
    for key in CONFIG_KEYS_TO_CHECK[one]:
        a, b = getattr(config0, key), getattr(config1, key)
        if a != b:
            raise ValueError(f"Configs are incompatible: for {key}, {a} != {b}")


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights and scalings of a loaded adapter by those of a saved one.

    Args:
        model: a PeftModel, compiled or not.
        model_name_or_path: folder of the new adapter, or ``owner/name`` on the hub.
        adapter_name: the adapter to replace; it keeps its name.
        torch_device: device to read the weights to; None: the accelerator, or the CPU.
        **kwargs: for the hub (``subfolder``, ``revision``, ``token``, …) and ``key_mapping``.

    Raises:
        ValueError: the configurations are not compatible, the file cannot be read, or the adapter
            is merged.
        RuntimeError: the new adapter has tensors in layers that the loaded one does not adapt.
            Nothing is changed after an error.
    """
    hub, rest = split_hub_kwargs(kwargs)
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    here = model.peft_config.get(adapter_name, model.active_peft_config)
    check_hotswap_configs_compatible(here, config)
    assert isinstance(config, LoraConfig)
    weights = load_peft_weights(
        model_name_or_path, torch_device or infer_device(), rest.get("key_mapping"), **hub
    )
    own = _places(uncompiled(model), adapter_name, config)
    named = {k if k in own else insert_adapter_name(k, adapter_name): v for k, v in weights.items()}
    short = f".{_MAGNITUDE}.{adapter_name}"  # files name the module, and not its weight
    named = {k + ".weight" if k.endswith(short) else k: v for k, v in named.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Copy tensors over those of a loaded adapter, in the same memory.

    Args:
        model: the model with the adapter, compiled or not.
        state_dict: tensors by their names in the model, which contain the adapter's name. Layers of
            the adapter without a tensor here are set to zero, and DoRA's magnitudes to the norms
            that they are divided by, so that such a layer computes as the base layer.
        adapter_name: the adapter to replace.
        config: the new adapter's configuration, with its ranks and scalings.
        parameter_prefix: how the names of adapter tensors begin.

    Raises:
        ValueError: the adapter is merged into the base weights, or a tensor is larger than its
            place in one dimension and smaller in another.
        RuntimeError: the model does not have these names. Nothing is changed after an error.
    """
    bare = uncompiled(model)
    if any(
        adapter_name in m.merged_adapters
        for m in adapter_modules(bare)
        if isinstance(m, BaseTunerLayer)
    ):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the "
            "base weights. Please unmerge the adapter first by calling "
            "`peft_model.unmerge_adapter()`; unmerging after a swap of merged weights would "
            "otherwise corrupt them."
        )
    places = dict(bare.named_parameters(remove_duplicate=False))
    state = {key.removeprefix(COMPILED): value for key, value in state_dict.items()}
    known = _places(bare, adapter_name, config)
    unexpected = [key for key in state if key not in places or key not in known]
    if unexpected:
        raise RuntimeError(
            "Hot swapping the adapter did not succeed, unexpected keys found: "
            f"{', '.join(unexpected)}."
        )
    for key, value in state.items():
        if (slot := known[key]) is not None:
            check_shared(bare, adapter_name, slot, key, value)
        here, new = tuple(places[key].shape), tuple(value.shape)
        if here != new and is_shard(places[key]):
            raise ValueError(
                f"Incompatible shapes found for LoRA weights {key}: {here} vs {new}. Ranks share "
                "it out (tensor parallelism), and then both adapters need the same rank."
            )
        larger = any(n > h for h, n in zip(here, new, strict=False))
        smaller = any(n < h for h, n in zip(here, new, strict=False))
        at, found, _ = key.rpartition("." + parameter_prefix)
        whole = bool(found) and _interleaved(bare.get_submodule(at))
        if (
            (whole and smaller)
            or len(here) != len(new)
            or (larger and smaller)
            or (smaller and len(here) not in (2, 4))
        ):
            raise ValueError(
                f"Incompatible shapes found for LoRA weights {key}: {here} vs {new}. Please ensure "
                "that all ranks are padded to the largest rank among all LoRA adapters by using "
                "peft.utils.hotswap.prepare_model_for_compiled_hotswap."
            )
    # the tensors of layers that the new adapter does not adapt
    rest = [
        key for key in places if key not in state and _is_of(key, adapter_name, parameter_prefix)
    ]
    aliases = further_names(bare) if config.alpha_pattern or config.rank_pattern else {}
    with torch.no_grad():
        for key in rest:
            places[key].zero_()
        for key, value in state.items():
            at, found, _ = key.rpartition("." + parameter_prefix)
            layer: Any = bare.get_submodule(at) if found else None
            if layer is not None:  # None: a base weight that was saved with the adapter
                names = [n.removeprefix(PREFIX) for n in aliases.get(id(layer), (at,))]
                _set_scaling(layer, adapter_name, _scaling_of(config, *names))
            groups = getattr(layer.get_base_layer(), "groups", 1) if ".lora_A." in key else 1
            _swap(places[key], value, groups)
        for key in rest:
            at, found, _ = key.rpartition(f".{_MAGNITUDE}.")
            if found:  # a magnitude of 0 would make DoRA's output 0; the norm leaves it unchanged
                layer = bare.get_submodule(at)
                norms = layer.lora_variant[adapter_name].norms(layer, adapter_name)
                places[key].copy_(norms.view_as(places[key]))


def _places(model: nn.Module, adapter_name: str, config: Any) -> dict[str, Slot | None]:
    """{name in the model: slot or None} of the tensors that a swap may write.

    These are the adapter's own and the base model's in its files; embeddings have their slot here.
    """
    slots = list(adapter_slots(model, adapter_name))
    found: dict[str, Slot | None] = {slot.model_key: None for slot in slots}
    beside = find_beside(model, config, slots)
    found.update({slot.model_key: slot for slot in beside.embeddings.values()})
    found.update({slot.model_key: None for slot in beside.biases.values()})
    return found


def _is_of(key: str, adapter_name: str, parameter_prefix: str) -> bool:
    """True when a parameter's name shows that it belongs to this adapter."""
    parts = key.split(".")
    return any(
        store.startswith(parameter_prefix) and name == adapter_name
        for store, name in zip(parts, parts[1:], strict=False)
    )


def _scaling_of(config: LoraConfig, *names: str) -> float:
    return scaling_of(*rank_and_alpha(config, *names), config.use_rslora)


def _set_scaling(layer: Any, adapter_name: str, scaling: float) -> None:
    """Set an adapter's scaling; a tensor is changed in place, as a compiled graph reads it."""
    have = layer.scaling[adapter_name]
    if isinstance(have, Tensor):
        have.fill_(scaling)
    else:
        layer.scaling[adapter_name] = scaling


def _swap(place: nn.Parameter, value: Tensor, groups: int) -> None:
    value = value.to(place.device, place.dtype)
    value = part_like(place, value)
    # written through the parameter, which counts the write, so that DoraCaching makes norms again
    if place.shape == value.shape:
        place.copy_(value)
    elif all(h >= n for h, n in zip(place.shape, value.shape, strict=True)):
        place.zero_()
        _put_into(place, value, 0 if place.shape[0] > value.shape[0] else 1, groups)
    else:  # the new tensor is larger, for which a compiled graph is compiled again
        place.data = value.clone()
