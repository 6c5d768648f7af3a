"""What the kernels of an MLP's elementwise step take and give, and the checks of it.

G, U, H [M, K], where K is the number of inputs of down; ranks r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import checks

# gelu is the one by erf, gelu_tanh its approximation, relu2 the square of relu
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class MlpMember(NamedTuple):
    """The adapter of gate or up: b [K, r], s [M, r] (None: dB is not wanted), and its scale."""

    b: torch.Tensor
    s: torch.Tensor | None
    scale: float


class MlpGrads(NamedTuple):
    """The gradients, None for what is not wanted; pairs are those of gate and of up."""

    dgate: torch.Tensor | None  # [M, K]
    dup: torch.Tensor | None  # [M, K]
    ds: list[torch.Tensor | None]  # [M, r] each, contiguous
    db: list[torch.Tensor | None]  # [K, r] each, contiguous
    da: torch.Tensor | None  # of down, [r, K], contiguous


def check(
    gate: torch.Tensor, up: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """G and U, checked, with unit strides along their rows."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
    gate = checks.rows("gate", gate)
    if up is not None:
        up = checks.rows("up", up, (gate.dtype,))
        checks.shape("up", up, tuple(gate.shape), "as gate")
    return gate, up


def check_members(
    members: Sequence[MlpMember | None], gate: torch.Tensor, up: torch.Tensor | None
) -> list[MlpMember | None]:
    """The adapters of gate and up, checked."""
    (M, K), dtype = gate.shape, gate.dtype
    if len(members) != 2:
        raise ValueError(f"members has {len(members)} entries; allowed: 2, for gate and for up")
    if up is None and members[1] is not None:
        raise ValueError("members[1] is given without up; allowed: None")
    checked: list[MlpMember | None] = []
    for i, member in enumerate(members):
        if member is not None:
            b, s = member.b, member.s
            checks.matrix(f"members[{i}].b", b)
            r = b.shape[1]
            checks.rank(f"members[{i}].b", r)
            checks.shape(f"members[{i}].b", b, (K, r), "[columns of gate, rank]")
            checks.adapter_dtype(f"members[{i}].b", b, dtype)
            if s is not None:
                s = checks.rows(f"members[{i}].s", s, (dtype,))
                checks.shape(f"members[{i}].s", s, (M, r), "[rows of gate, columns of b]")
            member = MlpMember(b, s, member.scale)
        checked.append(member)
    return checked


def check_outs(
    outs: tuple[torch.Tensor, torch.Tensor | None] | None,
    gate: torch.Tensor,
    up: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrices for dG and dU: those given, checked, or new ones."""
    if outs is None:
        shape = tuple(gate.shape)
        return gate.new_empty(shape), None if up is None else gate.new_empty(shape)
    if (outs[1] is None) != (up is None):
        raise ValueError(f"outs[1] and up: {outs[1] is None}, {up is None} are None; allowed: both")
    for i, t in enumerate(outs):
        if t is not None:
            if checks.rows(f"outs[{i}]", t, (gate.dtype,)) is not t:
                raise ValueError(f"outs[{i}] has strides {t.stride()}; allowed: 1 along its rows")
            checks.shape(f"outs[{i}]", t, tuple(gate.shape), "as gate")
    return outs
