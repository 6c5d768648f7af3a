"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

_IN_EIGHT_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer with learning rates of its own for A, B and adapters of embeddings.

    Args:
        model: a model with LoRA adapters; what does not train is left out.
        optimizer_cls: the optimizer's class.
        lr: learning rate of A, and of what is neither A nor B and has two dimensions or more.
        loraplus_lr_ratio: B, and vectors, learn with ``lr`` times this. 1 or larger.
        **kwargs: ``loraplus_weight_decay`` (0: for all but biases and what is in layer norms, of
            those that learn with B), ``loraplus_lr_embedding`` (1e-6: for A and B of embeddings);
            the others are ``optimizer_cls``'s.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms: tuple[type[nn.Module], ...] = tuple(ALL_LAYERNORM_LAYERS)
    undecayed = {
        name
        for prefix, module in model.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(prefix)
    }
    a: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    b_undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.split(".")[-2:-1] in (["lora_embedding_A"], ["lora_embedding_B"]):
            embedding.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            plain = "bias" in name or name in undecayed
            (b_undecayed if plain else b).append(parameter)
        else:
            a.append(parameter)
    lr_b = lr * loraplus_lr_ratio
    groups = [
        {"params": a, "weight_decay": decay, "lr": lr},
        {"params": embedding, "weight_decay": decay, "lr": lr_embedding},
        {"params": b, "weight_decay": decay, "lr": lr_b},
        {"params": b_undecayed, "weight_decay": 0.0, "lr": lr_b},
    ]
    make: Any = optimizer_cls
    optimizer: Optimizer = make(groups, lr=lr, **kwargs)
    if optimizer_cls.__name__ in _IN_EIGHT_BITS:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Let bitsandbytes keep 32 bits of an embedding's optimizer state, which 8 do not serve."""
    from bitsandbytes.optim import optimizer

    manager = optimizer.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
