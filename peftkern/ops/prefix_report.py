"""Describes the implementation of attention with a prefix on a device, for ``explain``."""

from __future__ import annotations

from torch import Tensor

from .backend import describe as chosen
from .prefix_attention import why_concat
from .prefix_rule import Rule

_ON_CPU = "blocks of one softmax (long float32 queries) or the vendor's attention for each part"
_ELSEWHERE = "the vendor's attention for each part, or concatenated keys under a mask"


def describe(
    like: Tensor,
    D: int,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[bool, str, str]:
    """(True if the Triton kernel may run, the implementation, the reason) for heads of D.

    ``like`` is a tensor of the activations' dtype and device. The others are the arguments of the
    layer's calls in training; ``bias`` is any tensor if they have one.
    """
    backend, why = chosen()
    always = why_concat(bias=bias, dropout=0.0, return_weights=False)
    if always is not None:
        return False, "concatenated keys", always
    trained = why_concat(bias=None, dropout=dropout, return_weights=False)
    note = "" if trained is None else f"; in training on concatenated keys: {trained}"
    if backend != "torch":
        from . import prefix_kernel

        refusals = [prefix_kernel.refusal(like, D, training) for training in (False, True)]
        if refusals[0] is None:
            if refusals[1] is not None and trained is None:
                note += f"; in training torch: {refusals[1]}"
            if backend == "triton":
                return True, "triton kernel", why + note
            return True, "kernel or torch", f"auto: {_raced(like, D)}{note}"
        why = f"{why}: {refusals[0]}"
    how = _ON_CPU if like.is_cpu else _ELSEWHERE
    scored = Rule(1.0, True, 0, softcap=softcap, sinks=sinks).scored
    if scored is not None:
        how = "concatenated keys, but for single rows on a CPU"
        note += f"; {scored}"
    return False, "torch", f"{why}: {how}{note}"


def _raced(like: Tensor, D: int) -> str:
    """The races of calls with heads of D in this dtype and on this device."""
    from . import auto_backend, prefix_auto

    found = []
    for kind, (winner, why) in prefix_auto.decisions(like, D):
        grads = "forward+backward" if kind.training else "forward"
        where = f"B={kind.B} T<={kind.rows} S<={kind.keys} P={kind.P}"
        found.append(f"{grads} {where} {winner} ({why})")
    if found:
        return ", ".join(found)
    off = auto_backend.races_off()
    return f"torch, for {off}" if off else "not called yet: raced at its first call"
