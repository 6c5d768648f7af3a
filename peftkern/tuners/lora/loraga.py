"""LoRA-GA (Wang et al., 2024, arXiv 2407.05000): A and B along the gradient of the full weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...ops.bases.formats import is_packed
from ...utils.undo import in_mode, remember_requires_grad
from .inits.calibration import has_content, linear_targets, load_tensors, model_device, save_tensors
from .inits.residual import Start, current, minus_product

GRADIENT = "_peft_loraga_grad"  # attribute of the base layer, with HF PEFT's name


def lora_ga(layer: Any, adapter: str, config: LoraConfig) -> Start | None:
    """The start from the gradient that :func:`preprocess_loraga` set on the base layer.

    The gradient is removed here. None without a gradient, as when an adapter is loaded.

    G ≈ U S Vᵀ with 2r triplets. A gets r of the right vectors, B the left vectors of other triplets
    times their S.

    Raises:
        ValueError: there is a gradient but no ``lora_ga_config``.
    """
    base = layer.get_base_layer()
    gradient = getattr(base, GRADIENT, None)
    if gradient is None:
        return None
    how = config.lora_ga_config
    if how is None:
        raise ValueError(
            "lora_ga_config must be provided when init_lora_weights='lora_ga'. Please pass "
            "lora_ga_config=LoraGAConfig(...) to LoraConfig."
        )
    r, s, transposed = layer.r[adapter], layer.scaling[adapter], layer.fan_in_fan_out
    weight = current(base.weight)
    G = gradient.to(torch.float32)
    G = G.T if transposed else G
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    chosen = torch.randperm(2 * r)[:r] if how.direction == "random" else first
    of_A, of_B = {
        "ArBr": (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
        "random": (chosen, chosen),
    }[how.direction]
    if 2 * r > S.numel():
        raise ValueError(
            f"LoRA-GA needs 2 * r = {2 * r} singular values, and a gradient {tuple(G.shape)} of "
            f"this layer has {S.numel()}"
        )
    of_A, of_B = of_A.to(S.device), of_B.to(S.device)
    A, B = V.T[of_A], U[:, of_B] * S[of_B]
    if how.scale == "stable":
        B = B * (base.weight.shape[0] ** 0.25 / how.stable_gamma**0.5)
    elif how.scale == "weight_svd":
        W = weight.to(torch.float32)
        largest = torch.svd_lowrank(W.T if transposed else W, q=r, niter=4)[1][0]
        if S[of_B][0] > 0:
            B = B * (largest / S[of_B][0])
    elif how.scale == "gd_scale":
        A, B = A / s, B / s
    # rounded before the product is subtracted from the weight, so that it is what the adapter adds
    A, B = (t.to(weight.dtype).float() for t in (A, B))
    delattr(base, GRADIENT)
    return minus_product(A.contiguous(), B.contiguous(), s, transposed)


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], None],
    cache_file: str | None = None,
) -> None:
    """Set the mean gradient of every targeted linear layer on the layer, for "lora_ga".

    Args:
        model: the model to be adapted afterwards. Its gradients and training mode do not change.
        lora_config: names the layers; must have ``lora_ga_config``.
        train_step: runs forward and backward, any number of times, without an optimizer.
        cache_file: a safetensors file with the gradients: read when it exists, else written.

    Raises:
        ValueError: no ``lora_ga_config``, no linear layer, a quantised one, or a cache that was
            made for other layers.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with "
            "init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig(...)."
        )
    targets = linear_targets(model, lora_config)
    for name, layer in targets:
        if is_packed(layer):
            raise ValueError(
                f"LoRA-GA does not support quantized models. Found quantized module: '{name}'. "
                "LoRA-GA requires full-precision gradients during preprocessing."
            )
    if cache_file is not None and has_content(cache_file):
        wanted = [f"{name}.{GRADIENT}" for name, _ in targets]
        found = load_tensors(cache_file, model_device(model), wanted)
        for name, layer in targets:
            setattr(layer, GRADIENT, found[f"{name}.{GRADIENT}"])
        return
    if not targets:
        raise ValueError(
            "No supported layers found for LoRA-GA initialization. LoRA-GA only supports nn.Linear "
            "and Conv1D layers. Please ensure your model contains at least one of these layer "
            "types in target_modules."
        )
    gradients = _gradients(model, targets, train_step)
    for layer, gradient in gradients:
        setattr(layer, GRADIENT, gradient)
    if cache_file is not None:
        names = {id(layer): name for name, layer in targets}
        save_tensors(
            cache_file, {f"{names[id(layer)]}.{GRADIENT}": grad for layer, grad in gradients}
        )


def _gradients(
    model: nn.Module, targets: list[tuple[str, Any]], train_step: Callable[[], None]
) -> list[tuple[Any, Tensor]]:
    """(layer, mean gradient of its weight over backward passes) after ``train_step``.

    During ``train_step`` only these weights train. Gradients that they have already do not count,
    and are put back.
    """
    put_flags_back = remember_requires_grad(model)
    earlier = [layer.weight.grad for _, layer in targets]
    passes = dict.fromkeys((id(layer) for _, layer in targets), 0)

    def count(layer: nn.Module, *_: Any) -> None:
        passes[id(layer)] += 1

    handles = [layer.register_full_backward_hook(count) for _, layer in targets]
    try:
        model.requires_grad_(False)
        for _, layer in targets:
            layer.weight.requires_grad_(True)
            layer.weight.grad = None
        with in_mode(model, training=True), torch.enable_grad():
            train_step()
        found = []
        for _, layer in targets:
            if passes[id(layer)] and layer.weight.grad is not None:
                found.append((layer, layer.weight.grad.detach() / passes[id(layer)]))
        return found
    finally:
        for (_, layer), grad in zip(targets, earlier, strict=True):
            layer.weight.grad = grad
        for handle in handles:
            handle.remove()
        put_flags_back()
