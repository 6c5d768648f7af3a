"""Models with DoRA on parameters, and the formula, expert by expert, with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.tuners.lora.parameter import ParamWrapper
from tests import moe_models
from tests.moe_models import VOCAB, adapt, numbers, tiny
from tests.test_experts_offload import Outside
from tests.tiny import fill


class Table(nn.Module):
    """A parameter of two dimensions in a module of no known class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.table.mT)


def small(layer: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 6), layer()).double()


def outside() -> nn.Module:
    torch.manual_seed(0)
    return Outside().double()


LINEAR = lambda: small(lambda: nn.Linear(6, 10))  # noqa: E731
CONV1D = lambda: small(lambda: Conv1D(10, 6))  # noqa: E731
# {name: (the base model, its parameters)}
BASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    **{
        kind: (lambda kind=kind: tiny(kind), moe_models.both(kind))
        for kind in ("plain", "transposed", "no_gate_bias_transposed")
    },
    "outside": (outside, moe_models.both("plain")),
    "linear": (LINEAR, ["1.weight"]),
    "conv1d": (CONV1D, ["1.weight"]),
    "table": (lambda: small(Table), ["1.table"]),
}
every = pytest.mark.parametrize("base", BASES)
experts = pytest.mark.parametrize("base", ["plain", "transposed", "outside"])


DORA = {"use_dora": True}


def made(base: str, names: Any = ("default",), **settings: Any) -> Any:
    """A model with DoRA on its parameters and drawn numbers; in evaluation mode."""
    make, targets = BASES[base]
    return adapt(peftkern, make(), names, **{"target_parameters": targets, **DORA, **settings})


def with_plain(base: str) -> Any:
    """With "dora", "plain" (LoRA) and "more" (DoRA)."""
    model = made(base, ("dora",))
    for name, use_dora in (("plain", False), ("more", True)):
        targets = BASES[base][1]
        config = {"r": 2, "target_modules": [], "target_parameters": targets}
        model.add_adapter(name, peftkern.LoraConfig(**config, use_dora=use_dora))
    fill(model)
    return model.eval()


def updated(wrapper: Any, W: Tensor, names: list[str], factors: dict[str, Tensor]) -> Tensor:
    """W with these adapters, expert by expert. ``factors``: {"lora_A.default.weight": tensor}."""
    conv1d, turned = isinstance(wrapper.base_layer, Conv1D), wrapper.in_first
    E = wrapper.num_experts
    rows = W.view(E, *W.shape[-2:])
    rows = rows.mT if turned else rows
    found = []
    for e in range(E):
        whole = base = rows[e]  # [N, K]
        for name in names:
            A, B = factors[f"lora_A.{name}.weight"], factors[f"lora_B.{name}.weight"]
            r, s = wrapper.r[name], wrapper.scaling[name]
            update = s * B[:, e::E] @ A[e * r : (e + 1) * r]
            whole = whole + update
            m = factors.get(f"lora_magnitude_vector.{name}.weight")
            if m is None:
                continue
            norm = (base + update).detach().norm(dim=0 if conv1d else 1)
            gain = m.view(E, -1)[e] / norm
            whole = whole * (gain if conv1d else gain[:, None])
        found.append(whole.mT if turned else whole)
    return torch.stack(found).view_as(W)


def formula(model: Any, base: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """:func:`moe_models.numbers` of the model by the formula, with autograd."""
    plain = BASES[base][0]().to(dtype)
    leaves: dict[str, Tensor] = {
        n: p.detach().to(dtype).clone().requires_grad_()
        for n, p in model.named_parameters()
        if "lora_" in n
    }
    weights = {}
    for at, wrapper in model.named_modules():
        if isinstance(wrapper, ParamWrapper):
            own = {n.removeprefix(f"{at}."): t for n, t in leaves.items()}
            key = next(k for k in BASES[base][1] if k.endswith(f".{wrapper.parameter_name}"))
            W = dict(plain.named_parameters())[key].detach()
            names = [n for n in wrapper.active_adapters if n in wrapper.lora_A]
            weights[key] = updated(wrapper, W, names, own)

    class Formula(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = functional_call(plain, weights, (x,))
            return out

    found = numbers(Formula())
    grads = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    return {**{k: found[k] for k in ("output", "loss")}, **grads}


def trained(model: Any) -> dict[str, Tensor]:
    """The numbers of a step, without gradients of adapters that are not active (none, or 0)."""
    return {k: v for k, v in numbers(model).items() if k in ("output", "loss") or "lora_" in k}
