"""``fuse``: gives an existing HF PEFT model the fused forward, for code that builds its own."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from . import liger as beside
from .tuners.lora.base import LoraLayer
from .tuners.lora.group import form_groups, ungroup_broken
from .tuners.lora.mlp import form_blocks, release_blocks

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, liger: bool = False) -> Model:
    """Give the LoRA layers of an HF PEFT model the fused forward, in place, and return the model.

    This is for every ``peft.tuners.lora.Linear`` (on ``nn.Linear``, transformers' ``Conv1D``, or a
    quantised layer that is read) and for HF PEFT's layers on bitsandbytes in 4 and 8 bit;
    q, k, v and gate, up train as one operation, and whole MLPs where their parts allow it. With
    ``target_parameters`` a mixture of experts is one operation too, and takes ``adapter_names``.
    The layers stay HF PEFT's objects with HF PEFT's state and API: parameters and state dict keys
    are the same, optimizers keep working, and adapters are added, switched, disabled, merged,
    rescaled, deleted, saved and loaded as before.
    Layers that cannot be one operation (DoRA, several active adapters, embeddings, convolutions,
    ...) run HF PEFT's forward; ``explain(model)`` lists them with the reasons.

    Layers that HF PEFT makes later (``add_adapter`` with other targets) run HF PEFT's forward until
    ``fuse`` is called again, which does not change the others.

    Args:
        model: a ``peft.PeftModel``, or any module with HF PEFT's LoRA layers in it. A model of
            peftkern is returned as it is, but for ``liger``.
        liger: apply the norms, rope and fused linear cross-entropy of liger-kernel to the base
            model too, on a GPU and after the adapters are there (docs/guide.md). With False, what
            is applied stays; ``unfuse`` takes it out.

    Raises:
        TypeError: not an ``nn.Module``.
        ValueError: the model holds no LoRA layer of HF PEFT; or with ``liger``, it is on the CPU,
            of another family than :data:`peftkern.liger.FAMILIES`, or with hooks of accelerate on
            what liger replaces. Nothing is changed.
        ImportError: with ``liger``, liger-kernel is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: `model` must be an nn.Module, got {type(model).__name__}")
    layers = hf_layers(model)
    if not layers:
        if any(isinstance(m, LoraLayer) for m in model.modules()) or _is_ours(model):
            if liger:
                beside.apply(model)
            return model
        raise ValueError(f"fuse: `model` must hold LoRA layers of HF PEFT; {_found(model)}")
    if liger:
        beside.apply(model)
    hf = hf_module()
    reasons = {name: hf.why_not(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if reasons[name] is None:
            hf.take_over(layer)
    if None not in reasons.values():
        why = "; ".join(f"{n} times {reason}" for reason, n in Counter(reasons.values()).items())
        warnings.warn(f"fuse: none of {len(layers)} LoRA layers is fused: {why}", stacklevel=2)
        return model
    form_groups(model, hf.Fused)
    form_blocks(model, hf.Fused)
    if _ungroup_broken not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_ungroup_broken)
    return model


def unfuse(model: Model) -> Model:
    """Give the layers of a fused model HF PEFT's forward again, in place, and return the model.

    What ``fuse(model, liger=True)`` applied is taken out, also of a model of peftkern.

    Raises:
        TypeError: not an ``nn.Module``.
        RuntimeError: a layer's class or forward was replaced after ``fuse`` (by ``fully_shard``, a
            parametrization, accelerate's hooks); undo that first. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: `model` must be an nn.Module, got {type(model).__name__}")
    layers = hf_layers(model)
    if not layers:
        beside.undo(model)
        return model
    hf = hf_module()
    fused = {name: layer for name, layer in layers.items() if hf.is_fused(layer)}
    for name, layer in fused.items():
        if type(layer) not in hf.FUSED.values() or "forward" in layer.__dict__:
            what = f"class {type(layer).__name__}" if "forward" not in layer.__dict__ else "forward"
            raise RuntimeError(
                f"unfuse: the layer {name!r} was given another {what} after it was fused; "
                "undo that first"
            )
    beside.undo(model)
    for layer in fused.values():
        hf.give_back(layer)
    release_blocks(model)
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if hook is _ungroup_broken]:
            del hooks[key]
            module.__dict__.pop("_breaks_seen", None)
    return model


def _ungroup_broken(model: nn.Module, args: Any) -> None:
    """A hook before the model's forward: switch off groups whose projections had other inputs."""
    ungroup_broken(model)


def hf_module() -> ModuleType:
    """The module for HF PEFT's layers, which imports HF PEFT; for models that have such layers."""
    from .tuners.lora import hf_layer

    return hf_layer


def hf_layers(model: nn.Module) -> dict[str, Any]:
    """{name: LoRA layer of HF PEFT, fused or not}.

    A model with such a layer has imported HF PEFT, so nothing is imported to find them.
    """
    kind = getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", None)
    if not isinstance(kind, type):
        return {}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, kind) and not isinstance(m, LoraLayer)
    }


def _is_ours(model: nn.Module) -> bool:
    from .model.base import PeftModel

    return isinstance(model, PeftModel)


def _found(model: Any) -> str:
    """Words for an error message: the adapters that the model has instead."""
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and configs:
        kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()})
        words = f"the adapters of this {type(model).__name__} are {', '.join(kinds)}"
        if any(getattr(c, "is_prompt_learning", False) for c in configs.values()):
            words += " (load prompts with peftkern.PeftModel.from_pretrained)"
        return words
    return f"{type(model).__name__} has no adapters"
