"""``quantize_base``: a dense frozen base in fp8, in place; and the choice of its arithmetic."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .fusing import hf_layers
from .ops.bases.formats import read, reader_of
from .ops.bases.fp8 import CHOICE, DEQUANTISE, IN_FP8, Fp8
from .ops.bases.fp8_linear import Fp8Linear
from .tuners.base_layer import BaseTunerLayer
from .tuners.lora.dequantising import name_quantization
from .tuners.lora.plan import is_hooked
from .tuners.modules_to_save import AuxiliaryTrainingWrapper
from .utils.private import kept_wide

Model = TypeVar("Model", bound=nn.Module)
METHODS = ("fp8",)
LAYERS = ("adapted", "all-linear")
COMPUTE = (DEQUANTISE, IN_FP8)


@torch.no_grad()
def quantize_base(
    model: Model, method: str = "fp8", *, compute: str = DEQUANTISE, layers: str | None = None
) -> Model:
    """Make dense frozen linear layers of the base model fp8, in place, and return the model.

    A weight [N, K] becomes e4m3 with a float32 scale for each block of 128 x 128: half of a bf16
    weight's bytes. The copy serves forward and backward. An element is off by at most 2^-4 of
    itself, or 2^-10 of its block's scale (max |W| / 448) where that is more; for a normally
    distributed weight that is 2.6% in the Frobenius norm. Adapters and their names in checkpoints
    stay as they are, and optimizers go on. ``explain`` names the format.
    DistributedDataParallel over gloo, on CPUs, refuses the model: gloo does not send float8.

    Args:
        model: with adapters of peftkern's or HF PEFT's, or before they are added.
        method: "fp8".
        compute: what products with W are computed in, as for :func:`set_base_compute`.
        layers: "adapted": the base layers under adapters. "all-linear": those, and every other
            ``nn.Linear`` but output heads and modules that adapters train in full. None: "adapted"
            if the model has adapters, or else "all-linear". Then weights count as frozen whatever
            their ``requires_grad``, as adapters freeze them. Layers that transformers leaves out
            when it quantises a model (T5's ``wo``) stay dense in each case, which is logged.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: another ``method``, ``compute`` or ``layers``; the model has no such layer; or
            one has a weight that is trained, tied, quantised, merged, not finite, or on the meta
            device, or computes its product in its own way. Nothing is changed then.
    """
    _check_choice("quantize_base", "method", method, METHODS)
    _check_choice("quantize_base", "compute", compute, COMPUTE)
    _check_choice("quantize_base", "layers", layers, (*LAYERS, None))
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_base: `model` must be an nn.Module, got {type(model).__name__}")
    adapted = _adapted(model)
    found = dict(adapted)
    if layers == "all-linear" or (layers is None and not adapted):
        found.update(_other_linears(model, adapted))
    found = _without_wide(model, found)
    if not found:
        what = "base layers under adapters" if layers == "adapted" else "linear layers"
        raise ValueError(f"quantize_base: the model has no {what}")
    _check(model, found, frozen=not adapted)
    count, before, after = 0, 0, 0
    places: dict[int, list[str]] = {}
    for name, dense in found.items():
        places.setdefault(id(dense), []).append(name)
    waiting = list({id(m): m for m in found.values()}.values())
    bare = not adapted
    del found, adapted, dense  # so that each dense weight is freed as soon as it is replaced
    while waiting:
        dense = waiting.pop()
        made = Fp8Linear(dense)
        made.__dict__[CHOICE] = compute
        for name in places[id(dense)]:
            model.set_submodule(name, made)
        count, before = count + 1, before + dense.weight.nbytes
        after += made.weight.nbytes + made.weight_scale_inv.nbytes
    if bare:
        name_quantization(model)
    logging.getLogger("peftkern").info(
        "quantize_base: %d linear layers are fp8: %.1f MiB, and %.1f MiB before",
        count,
        after / 2**20,
        before / 2**20,
    )
    return model


def set_base_compute(model: Model, compute: str) -> Model:
    """Choose what products with fp8 weights of the base are computed in; returns the model.

    "dequantise", as every layer starts: W is dequantised for each product, in the dtype of X. The
    numbers are HF PEFT's. "fp8": X and, in the backward, dY are quantised to e4m3, with a scale a
    row (128 of a row for weights in blocks of 128 x 128), and multiplied with the packed W on the
    matrix units; each of their elements is off by at most 2^-4 of itself. Low-rank products and
    their gradients stay in the dtype of X. Where the device, torch or the shape does not allow
    it, W is dequantised all the same; ``explain`` says which layers and why.

    The choice is one of the session: it is not saved.

    Args:
        model: with fp8 weights of :func:`quantize_base`, transformers' FineGrainedFP8, torchao or
            compressed-tensors in linear layers.
        compute: "dequantise" or "fp8".

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: another ``compute``, or the model has no fp8 weights.
    """
    _check_choice("set_base_compute", "compute", compute, COMPUTE)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_base_compute: `model` must be an nn.Module, got {type(model).__name__}"
        )
    layers = [m for m in model.modules() if _is_fp8(m)]
    if not layers:
        raise ValueError("set_base_compute: the model has no linear layers with fp8 weights")
    for layer in layers:
        layer.__dict__[CHOICE] = compute
    return model


def _check_choice(function: str, name: str, given: Any, allowed: tuple[Any, ...]) -> None:
    if given not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"{function}: `{name}` is {given!r}; allowed: {words}")


def _is_fp8(module: nn.Module) -> bool:
    if reader_of(module) is None:
        return False
    found = read(module)
    if isinstance(found, str):
        return False
    return isinstance(getattr(found.packed, "inner", found.packed), Fp8)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """{name: base layer} of the adapter layers on linear layers, also of HF PEFT's."""
    theirs = hf_layers(model)
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BaseTunerLayer) and name not in theirs:
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D":
            found[f"{name}.base_layer"] = base
    return found


def _other_linears(model: nn.Module, adapted: dict[str, Any]) -> dict[str, Any]:
    """{name: module} of the plain linear layers that no adapter is on."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    skipped = {id(m) for m in adapted.values()} | {id(head)}
    for _, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, AuxiliaryTrainingWrapper) or kind.endswith("ToSaveWrapper"):
            skipped.update(id(m) for m in module.modules())
        elif isinstance(module, BaseTunerLayer) or hasattr(module, "adapter_layer_names"):
            skipped.update(id(m) for m in module.modules() if m is not module)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and id(module) not in skipped and not _is_head(name)
    }


def _without_wide(model: nn.Module, found: dict[str, Any]) -> dict[str, Any]:
    """``found`` without the layers that the model's class keeps from quantisation, logged."""
    kept = [re.compile(rf"(?:^|\.){name}(?:\.|$)") for name in kept_wide(model)]
    wide = [name for name in found if any(pattern.search(name) for pattern in kept)]
    if wide:
        logging.getLogger("peftkern").info(
            "quantize_base: %d layers stay dense, as in transformers' own quantisation: %s%s",
            len(wide),
            ", ".join(wide[:3]),
            " ..." if len(wide) > 3 else "",
        )
    return {name: module for name, module in found.items() if name not in wide}


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "score", "classifier", "qa_outputs")


def _check(model: nn.Module, found: dict[str, Any], frozen: bool) -> None:
    """Raise a ValueError that names the first layers which cannot be fp8, with the reasons."""
    merged = {
        id(m.base_layer)
        for m in model.modules()
        if getattr(m, "merged_adapters", None) and hasattr(m, "base_layer")
    }
    of_parameters = {
        id(m.base_layer) for m in model.modules() if getattr(m, "layer_kind", "") == "parameter"
    }
    shared = Counter(
        id(p)
        for m in model.modules()
        for p in m._parameters.values()
        if p is not None and p is not getattr(m, "bias", None)
    )
    wrong = {
        name: why
        for name, module in found.items()
        if (why := _why_not(module, frozen, id(module) in merged, shared)) is not None
    }
    for name, module in found.items():
        if id(module) in of_parameters:
            wrong[name] = "an adapter is on its parameter (`target_parameters`)"
    if wrong:
        some = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"quantize_base: {len(wrong)} of {len(found)} layers cannot be fp8: {some}{more}"
        )


def _why_not(module: Any, frozen: bool, merged: bool, shared: Counter[int]) -> str | None:
    weight = module._parameters.get("weight")
    if reader_of(module) is not None:
        return "its weight is quantised already"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, and only nn.Linear can be"
    if type(weight) is not Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if is_hooked(module):
        return "it has hooks or an overridden forward (accelerate's offloading?)"
    if weight.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}"
    if merged:
        return "adapters are merged into it; call unmerge_adapter() first"
    if weight.requires_grad and not frozen:
        return "its weight is trained (requires_grad)"
    if shared[id(weight)] > 1:
        return "its weight is tied to another module's"
    if not bool(_finite(weight)):
        return "its weight has NaN or infinity in it"
    return None


def _finite(weight: Tensor) -> Tensor:
    return weight.isfinite().all()
