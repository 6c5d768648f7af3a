"""The checks of a call of ``lora_experts``, made before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mlp_torch import ACTIVATIONS
from .gates import LAYOUTS
from .parts import Call, ExpertLinear, Gate

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # that kernels.experts_route takes


def check(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    gate: Gate,
    choice: Tensor | None,
    autocast: bool,
) -> None:
    """Raise ValueError or TypeError for arguments that do not fit each other.

    The values of ``index`` and ``choice`` are checked where they are read.
    """
    if x.dim() != 2:
        _refuse("x", x, "[T, K]")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        _refuse("index", index, f"[{x.shape[0]}, k], for x of {_shape(x)}")
    if weights.shape != index.shape:
        _refuse("weights", weights, f"{_shape(index)}, as index")
    _check_integer("index", index)
    if not weights.is_floating_point():
        raise TypeError(f"lora_experts: weights is {weights.dtype}; allowed: floating point")
    if gate.layout not in LAYOUTS:
        raise ValueError(
            f"lora_experts: gate.layout is {gate.layout!r}; allowed: {', '.join(LAYOUTS)}"
        )
    if gate.name is not None and gate.name not in ACTIVATIONS:
        raise ValueError(
            f"lora_experts: gate.name is {gate.name!r}; allowed: None (any function) or "
            f"{', '.join(ACTIVATIONS)}"
        )
    if gate.clamp is not None and (gate.name is not None or gate.layout == "alone"):
        raise ValueError(
            f"lora_experts: gate.clamp is given with gate.name={gate.name!r} and "
            f"gate.layout={gate.layout!r}; allowed: a gate without a name, of two inputs"
        )
    if up.weight.dim() != 3 or up.weight.shape[2] != x.shape[1]:
        _refuse("up.weight", up.weight, f"[E, N1, {x.shape[1]}], for x of {_shape(x)}")
    E, N1, _ = up.weight.shape
    alone = gate.layout == "alone"
    width = N1 if alone else N1 // 2
    if not alone and N1 % 2:
        _refuse("up.weight", up.weight, f"[E, 2·I, K], as gate.layout is {gate.layout!r}")
    if down.weight.dim() != 3 or (down.weight.shape[0], down.weight.shape[2]) != (E, width):
        _refuse(
            "down.weight",
            down.weight,
            f"[{E}, N, {width}], for up.weight of {_shape(up.weight)} and "
            f"gate.layout={gate.layout!r}",
        )
    _check_dtypes(x, up, down, autocast)
    for name, part in (("up", up), ("down", down)):
        _check_part(name, part, E)
    if choice is not None:
        _check_integer("choice", choice)
        if choice.shape != x.shape[:1]:
            _refuse("choice", choice, f"[{x.shape[0]}], an adapter for each token")
        if len(up.factors) != len(down.factors):
            raise ValueError(
                f"lora_experts: with choice, up has {len(up.factors)} adapters and down "
                f"{len(down.factors)}; allowed: as many (of rank 0 where one has no factors)"
            )
    for name, t in (("index", index), ("weights", weights), ("choice", choice)):
        _check_device(name, t, x)


def check_functions(call: Call) -> None:
    """Raise ValueError if the gate or the norm has gradients of its own, which would be lost.

    A row of zeros tells, and so it does whether an unknown gate makes H of down's width.
    """
    unknown = call.gate.name is None and call.gate.clamp is None
    with torch.enable_grad():
        if unknown:
            h = call.gate.function(call.x.new_zeros((1, call.up.weight.shape[1])))
            width = call.down.weight.shape[2]
            if h.shape != (1, width):
                raise ValueError(
                    f"lora_experts: gate.function makes {_shape(h)} of one row; allowed: "
                    f"[1, {width}], for down.weight of {_shape(call.down.weight)}"
                )
            _check_frozen("gate.function", h)
        if call.norm is not None:
            _check_frozen("norm", call.norm(call.x.new_zeros((1, call.down.weight.shape[1]))))


def _check_frozen(name: str, made: Tensor) -> None:
    if made.requires_grad:
        raise ValueError(
            f"lora_experts: {name} has a tensor of its own that requires a gradient; "
            "allowed: frozen ones"
        )


def _check_part(name: str, part: ExpertLinear, E: int) -> None:
    weight, bias, factors = part
    N, K = weight.shape[1:]
    if weight.requires_grad:
        raise ValueError(
            f"lora_experts: {name}.weight requires a gradient; allowed: frozen weights"
        )
    if bias is not None and bias.shape != (E, N):
        _refuse(f"{name}.bias", bias, f"[{E}, {N}], for {name}.weight of {_shape(weight)}")
    for i, f in enumerate(factors):
        A, B, where = f.A, f.B, f"{name}.factors[{i}]"
        if A.dim() != 2 or A.shape[1] != K or A.shape[0] % E:
            _refuse(f"{where}.A", A, f"[r·{E}, {K}], for {name}.weight of {_shape(weight)}")
        if B.shape != (N, A.shape[0]):
            _refuse(f"{where}.B", B, f"[{N}, {A.shape[0]}], for A of {_shape(A)}")
        if A.dtype != B.dtype or not A.is_floating_point():
            raise TypeError(
                f"lora_experts: {where} has A in {A.dtype} and B in {B.dtype}; "
                f"allowed: one floating point dtype"
            )
        if not 0.0 <= f.p < 1.0:
            raise ValueError(f"lora_experts: {where}.p is {f.p}; allowed: 0 <= p < 1")
        _check_device(f"{where}.A", A, weight)
        _check_device(f"{where}.B", B, weight)


def _check_dtypes(x: Tensor, up: ExpertLinear, down: ExpertLinear, autocast: bool) -> None:
    named: list[tuple[str, Tensor | None]] = [
        ("down.weight", down.weight), ("up.bias", up.bias), ("down.bias", down.bias)
    ]  # fmt: skip
    dtype = up.weight.dtype
    for name, t in named:
        if t is not None and t.dtype != dtype:
            raise TypeError(f"lora_experts: {name} is {t.dtype}; allowed: {dtype}, as up.weight is")
    if not autocast and x.dtype != dtype:
        raise TypeError(
            f"lora_experts: x is {x.dtype}; allowed: {dtype}, as up.weight is "
            f"(any dtype under autocast)"
        )
    for name, t in (("x", x), ("up.weight", up.weight)):
        if not t.is_floating_point():
            raise TypeError(f"lora_experts: {name} is {t.dtype}; allowed: floating point")
    for name, t in [("up.weight", up.weight), *named]:
        _check_device(name, t, x)


def _check_integer(name: str, t: Tensor) -> None:
    if t.dtype not in _INTEGERS:
        raise TypeError(f"lora_experts: {name} is {t.dtype}; allowed: int64, int32, int16 or uint8")


def _check_device(name: str, t: Tensor | None, x: Tensor) -> None:
    if t is not None and t.device != x.device:
        raise ValueError(
            f"lora_experts: {name} is on {t.device}; allowed: {x.device}, as the others are"
        )


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def _refuse(name: str, given: Any, allowed: str) -> None:
    raise ValueError(f"lora_experts: {name} has shape {_shape(given)}; allowed: {allowed}")
