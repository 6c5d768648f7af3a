"""Intruder dimensions (Shuttleworth et al., 2024, arXiv 2410.21228): an adapter with less of them.

W + s B A = U Σ Vᵀ. A leading left singular vector u_i that is like none of W's is an intruder:
fine-tuning has put it in, and what the model knew before is forgotten by it. The new adapter is
that of rank r nearest to s B A + (λ - 1) Σ_i σ_i u_i v_iᵀ over the intruders i.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules_to_save import ModulesToSaveWrapper
from .base import LoraLayer
from .embedding import Embedding
from .linear import Linear


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[..., Any] | None = print,
) -> None:
    """Add an adapter like another one, with less of its intruder dimensions, and make it active.

    It forgets less of what the base model knew, and does its task a little less well.

    Args:
        peft_model: a PeftModel with plain LoRA on linear layers and embeddings.
        old_adapter_name: the trained adapter, which is not changed.
        new_adapter_name: the name of the new one.
        top_k: how many leading singular vectors are looked at.
        threshold_epsilon: a vector is an intruder when its largest |cosine| with one of the base
            weight's is below this.
        mitigation_lambda: λ, the share of an intruder that is kept.
        logging_sink: called with a line for each layer; None: silence.

    Raises:
        ValueError: the model has no LoRA adapter of the old name, or has one of the new; or the
            adapter is not plain LoRA on weights of two dimensions. Nothing is changed.
    """
    if peft_model.peft_type != "LORA":
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    if old_adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"`old_adapter_name` must be one of {sorted(peft_model.peft_config)}, got "
            f"{old_adapter_name!r}"
        )
    say = logging_sink if logging_sink is not None else lambda *_: None
    layers = _layers(peft_model, old_adapter_name)
    config = copy.deepcopy(peft_model.peft_config[old_adapter_name])
    peft_model.add_adapter(new_adapter_name, config)
    with torch.no_grad():
        for name, layer in layers.items():
            B, A, found = _reduced(
                layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda
            )
            say(f"{name}: Intruders: {found}" if found else f"{name}: No intruders")
            pairs = (_pair(layer, which) for which in (old_adapter_name, new_adapter_name))
            for old, new, value in zip(*pairs, (B, A), strict=True):
                new.data = (
                    value.detach().to(old.dtype).contiguous().clone()
                )  # of the old one's dtype
            if layer.lora_bias.get(old_adapter_name):
                bias = layer.lora_B[old_adapter_name].bias
                layer.lora_B[new_adapter_name].bias.data = bias.detach().clone()
        for module in peft_model.modules():
            kept: Any = module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else {}
            if old_adapter_name in kept and new_adapter_name in kept:
                state = kept[old_adapter_name].state_dict()
                kept[new_adapter_name].load_state_dict(state)
    say(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """{name: layer} of those with the adapter; ValueError for one that has no factors to reduce."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        plain = type(layer) in (Linear, Embedding) and adapter not in layer.lora_variant
        if not plain or weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                "reduce_intruder_dimension works on plain LoRA on linear layers and embeddings "
                f"that are not quantised; `{name}` is another: {layer.layer_kind or 'a'} layer, "
                f"{type(layer.get_base_layer()).__name__}"
            )
        found[name] = layer
    return found


def _pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The parameters B [N, r] and A [r, K]."""
    if isinstance(layer, Embedding):
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def _reduced(
    layer: Any, adapter: str, top_k: int, epsilon: float, keep: float
) -> tuple[Tensor, Tensor, int]:
    """(B, A, number of intruders) of the new adapter; the old B and A where there are none."""
    weight = layer.get_base_layer().weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    W = weight.to(wide)
    merged = W + layer._delta_weight(adapter).to(W)
    before = torch.linalg.svd(W, full_matrices=False)[0]
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    cosines = (U.T @ before).abs().amax(1)
    intruders = (cosines[:top_k] < epsilon).nonzero().flatten()
    if not len(intruders):
        return (*_pair(layer, adapter), 0)
    taken = (U[:, intruders] * S[intruders]) @ Vh[intruders]
    update = (merged + (keep - 1) * taken - W) / layer.scaling[adapter]
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    r = layer.r[adapter]
    left, right = U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vh[:r]
    if isinstance(layer, Embedding) or layer.fan_in_fan_out:  # the weight is [K, N]
        left, right = right.T, left.T
    return left, right, len(intruders)
