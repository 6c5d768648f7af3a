"""The choice between the Triton kernel and torch for prefix attention, with ``auto`` on CUDA.

The first call of a kind is raced on its own tensors (:mod:`.race`), with forward and backward
together when there are gradients. The result decides for all calls of the kind: those with equal
numbers, but with rows and own keys up to the same powers of two. A kind stays with torch when its
first call may not race (a CUDA graph is being captured, another thread is racing), so that a
checkpointed layer is recomputed in the same way. With ``PEFTKERN_RACE=0`` all calls go to torch.
Decisions last as long as the process: no table ships them and no file keeps them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.private import without_dispatch_modes
from . import auto_backend, prefix_kernel, prefix_sampled, race
from .choices import TORCH
from .device import capturing, on_its_device
from .prefix_rule import Rule

log = logging.getLogger("peftkern")

KERNEL = "kernel"
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, kp, vp


class Kind(NamedTuple):
    """The numbers that are equal in all calls that one decision serves."""

    device: int
    dtype: torch.dtype
    training: bool
    B: int
    H: int
    H_kv: int
    D: int
    P: int
    shared: bool  # one prefix for the whole batch
    rows: int  # the next power of two from T on
    keys: int  # the next power of two from S on
    options: tuple[bool, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, kp: Tensor, rule: Rule, training: bool) -> Kind:
        B, H, T, D = q.shape
        return cls(
            q.get_device(), q.dtype, training, B, H, k.shape[1], D, kp.shape[-2], kp.dim() == 3,
            1 << (T - 1).bit_length(), 1 << (k.shape[2] - 1).bit_length(),
            (
                rule.causal, rule.window is not None, rule.keep is not None,
                rule.no_prefix is not None, isinstance(rule.offset, Tensor),
                rule.softcap is not None, rule.sinks is not None,
            ),
        )  # fmt: skip


_decisions: dict[Kind, tuple[str, str]] = {}  # {kind: (winner, reason)}
_racing = threading.Lock()


def decisions(like: Tensor, D: int) -> list[tuple[Kind, tuple[str, str]]]:
    """[(kind, (winner, reason))] for heads of D in the dtype and on the device of ``like``."""
    wanted = (like.get_device(), like.dtype, D)
    return [
        (kind, found)
        for kind, found in list(_decisions.items())
        if (kind.device, kind.dtype, kind.D) == wanted
    ]


@on_its_device
def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor,
    vp: Tensor,
    rule: Rule,
    training: bool,
    torch_way: Callable[..., Tensor],
) -> str | None:
    """The reason that torch runs this call; None when the kernel does.

    Args:
        q, k, v, kp, vp, rule: of the call, which the kernel takes.
        training: True if gradients are wanted.
        torch_way: the function that runs instead of the kernel, from q, k, v, kp, vp and the rule
            to O; it is differentiable.
    """
    kind = Kind.of(q, k, kp, rule, training)
    found = _decisions.get(kind)
    if found is None:
        off = auto_backend.races_off()
        if off is not None:
            return off
        if capturing(q):
            found = TORCH, "inside a CUDA graph capture, before any race"
        elif not _racing.acquire(blocking=False):  # no waiting: it could be for this very thread
            found = TORCH, "another thread was racing"
        else:
            try:
                found = _race((q, k, v, kp, vp), rule, training, torch_way)
            finally:
                _racing.release()
        found = _decisions.setdefault(kind, found)
    winner, why = found
    return None if winner == KERNEL else why


def _race(
    tensors: Five, rule: Rule, training: bool, torch_way: Callable[..., Tensor]
) -> tuple[str, str]:
    ways = {TORCH: _run(tensors, rule, torch_way, training)}
    needs: Any = None
    if training:
        ways[KERNEL] = _kernel_step(tensors, rule)
        needs = tuple(t.requires_grad for t in tensors)
    else:
        ways[KERNEL] = lambda: prefix_kernel.forward(*tensors, rule)[0]
    exact = prefix_sampled.attention(tensors, rule, needs)
    op = _told(*tensors[:2], tensors[3], training)
    try:
        with without_dispatch_modes(), torch.no_grad():
            outcome, _ = race.run(ways, tensors[0].dtype, auto_backend.clock, exact=exact, op=op)
    except race.Undecided as e:
        return TORCH, f"no race: {e}"
    except Exception as e:  # a race is optional: whatever fails in it, the call goes on
        log.warning("a race of %s failed: %s", op, race.said(e))
        return TORCH, f"race failed: {race.said(e)}"
    if TORCH in outcome.left_out:
        return KERNEL, f"raced in this process without torch: {outcome.left_out[TORCH]}"
    if KERNEL in outcome.left_out:
        return TORCH, f"the kernel was left out of a race: {outcome.left_out[KERNEL]}"
    times = outcome.times
    gain = times[TORCH] / times[KERNEL]
    return outcome.winner, f"raced in this process: the kernel is {gain:.2f}x as fast as torch"


def _told(q: Tensor, k: Tensor, kp: Tensor, training: bool) -> str:
    shapes = f"query {list(q.shape)}, {k.shape[1]} key heads, S={k.shape[2]}, P={kp.shape[-2]}"
    return f"prefix attention, {'with' if training else 'without'} gradients, {shapes}"


def _run(tensors: Five, rule: Rule, way: Callable[..., Tensor], training: bool) -> race.Run:
    """A function that gives O and in training the gradients of tensors that need one.

    The gradient of O is O itself.
    """
    if not training:
        return lambda: way(*tensors, rule)

    def step() -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            o = way(*leaves, rule)
            wanted = [t for t in leaves if t.requires_grad]
            grads = torch.autograd.grad(o, wanted, o.detach()) if wanted else ()  # the sinks' alone
            return [o.detach(), *grads]

    return step


def _kernel_step(tensors: Five, rule: Rule) -> race.Run:
    needs: Any = tuple(t.requires_grad for t in tensors)

    def step() -> list[Tensor]:
        o, lse = prefix_kernel.forward(*tensors, rule)
        grads = prefix_kernel.backward(o, *tensors, o, lse, rule, needs)
        return [o, *(g for g in grads[:5] if g is not None)]

    return step
