"""LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): A is frozen and B's gradient is projected.

The update that B makes to W is s B A. The gradient G of B becomes G (A Aᵀ)⁻¹ / s², with which s B A
moves as near to full fine-tuning's step as a frozen A lets it; AdamW does the rest.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_DELTA = 1e-8  # added to A Aᵀ's diagonal, as HF PEFT does
# (the layer, "embedding_" or nothing, A or B, the adapter) of an A's or B's name
_FACTOR = re.compile(r"(.*\.|)lora_(embedding_|)([AB])\.([^.]+)(?:\.weight)?")


class LoraFAOptimizer(Optimizer):
    """AdamW in which B of every A and B learns with a projected gradient and A stays.

    Other parameters that have a gradient learn with AdamW (decoupled decay after the step, as
    transformers' former AdamW).

    Args:
        params: parameters, or groups of them. A group needs ``names`` and ``scaling_factors``,
            of the length of ``params``: each one's name in the model and, of A and B, s.
            :func:`create_lorafa_optimizer` makes them.
        lr: learning rate, at least 0.
        betas: decay rates of the averages of the gradient and of its square, in [0, 1).
        eps: added to the root of the latter, at least 0.
        weight_decay: share of a parameter that a step with lr 1 takes away.
        correct_bias: correct the averages for their start at 0.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(
            params, {**defaults, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )
        self._noted_old_name = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes the loss again, returns.

        Raises:
            KeyError: a group has no ``scaling_factors``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        states: Any = self.state  # by name, as in HF PEFT
        for group in self.param_groups:
            scalings = self._scalings(group)
            factors = {
                (m[1], m[2], m[4], m[3]): p
                for p, name in zip(group["params"], group["names"], strict=True)
                if (m := _FACTOR.fullmatch(name))
            }
            for p, name, scaling in zip(group["params"], group["names"], scalings, strict=True):
                found = _FACTOR.fullmatch(name)
                pair = found and factors.get((found[1], found[2], found[4], "A"))
                if found is None or pair is None or (*found.group(1, 2, 4), "B") not in factors:
                    if p.grad is not None:
                        _adamw(p, p.grad, states[name], group)
                elif found[3] == "B" and p.grad is not None:
                    grad = projected(p.grad, pair, scaling)
                    _adamw(p, grad, states[self._key(found, factors)], group, "_B")
        return loss

    def _scalings(self, group: dict[str, Any]) -> list[Any]:
        if "scaling_factors" in group:
            return list(group["scaling_factors"])
        if "scaling_factor" not in group:
            raise KeyError("Expected optimizer param group to define `scaling_factors`.")
        if not self._noted_old_name:
            warnings.warn(
                "`scaling_factor` is deprecated and will be removed after 2026-11-01. Please use "
                "`scaling_factors` instead.",
                FutureWarning,
                stacklevel=3,
            )
            self._noted_old_name = True
        return [group["scaling_factor"]] * len(group["params"])

    @staticmethod
    def _key(found: re.Match[str], factors: dict[Any, Any]) -> str:
        """The name of B's state; a layer's first adapter has HF PEFT's."""
        layer, kind, _, adapter = found.groups()
        first = next(key[2] for key in factors if key[0] == layer and key[1] == kind)
        return f"{layer}lora" if adapter == first else f"{layer}lora.{adapter}"


def is_bf16_available() -> bool:
    """False on a GPU without bfloat16."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def projected(grad: Tensor, a: Tensor, scaling: float) -> Tensor:
    """G (A Aᵀ + δ I)⁻¹ / s², of G's dtype.

    The product runs in bfloat16 where the device has it, as in HF PEFT.

    Args:
        grad: G [N, r].
        a: A [r, K].
        scaling: s.
    """
    gram = a @ a.T
    inverse = torch.linalg.pinv(gram + _DELTA * torch.eye(len(a), device=a.device))
    half: Any = contextlib.nullcontext()
    if is_bf16_available():
        half = torch.autocast(grad.device.type, torch.bfloat16)
    with half:
        found: Tensor = (1 / scaling**2) * (grad @ inverse)
    return found.to(grad.dtype)


def _adamw(p: Tensor, grad: Tensor, state: Any, group: dict[str, Any], suffix: str = "") -> None:
    """A step of AdamW on ``p``; ``suffix`` ends the names of the averages in ``state``."""
    mean, square = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
    if not state:
        state.update({"step": 0, mean: torch.zeros_like(p), square: torch.zeros_like(p)})
    beta1, beta2 = group["betas"]
    state["step"] += 1
    state[mean].mul_(beta1).add_(grad, alpha=1.0 - beta1)
    state[square].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    rate = group["lr"]
    if group["correct_bias"]:
        steps = state["step"]
        rate = rate * math.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
    p.addcdiv_(state[mean], state[square].sqrt().add_(group["eps"]), value=-rate)
    if group["weight_decay"] > 0.0:
        p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: Any,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze every A of the model and return a :class:`LoraFAOptimizer` for the rest.

    Args:
        model: a PeftModel with LoRA adapters, changed in place.
        r, lora_alpha: of the configuration. Each layer's own scaling is what counts; these are
            kept in the group under HF PEFT's old name, ``scaling_factor``.
        lr: learning rate.
        weight_decay: as of :class:`LoraFAOptimizer`.
        use_rslora: deprecated: it is the configuration's.

    Raises:
        ValueError: ``use_rslora`` is not that of every active adapter.
    """
    rslora = {
        name: bool(getattr(model.peft_config[name], "use_rslora", False))
        for name in model.active_adapters
        if name in model.peft_config
    }
    if use_rslora is not None:
        others = [name for name, value in rslora.items() if value != use_rslora]
        if others:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the "
                "following active adapters have `use_rslora` set differently in the model config: "
                f"{others}. Please configure rsLoRA via LoraConfig and remove the `use_rslora` "
                "argument from create_lorafa_optimizer as the parameter is deprecated."
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after "
            "2026-11-01. Please configure rsLoRA via LoraConfig instead.",
            FutureWarning,
            stacklevel=2,
        )
    rooted = use_rslora if use_rslora is not None else bool(rslora) and all(rslora.values())
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            parameter.requires_grad_(False)
    named = list(model.named_parameters())
    group = {
        "params": [parameter for _, parameter in named],
        "lr": lr,
        "names": [name for name, _ in named],
        "scaling_factors": [_scaling_of(model, name) for name, _ in named],
        "scaling_factor": lora_alpha / math.sqrt(r) if rooted else lora_alpha / r,
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _scaling_of(model: nn.Module, name: str) -> float | None:
    """s of the layer and adapter that a parameter's name tells; None for another parameter."""
    layer, _, rest = name.rpartition(".lora_")
    parts = rest.split(".")
    if not layer or len(parts) < 2:
        return None
    scaling = getattr(model.get_submodule(layer), "scaling", {})
    return scaling[parts[1]] if parts[1] in scaling else None
