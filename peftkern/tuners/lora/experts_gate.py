"""The gate of a module of experts as the operation takes it: by a name, by constants, or called.

Kernels know act(G) ∘ U for some activations, and the clamped gates of gpt-oss and its like
(:func:`...ops.experts.gates.clamped`). A clamped gate is a method of its class. It is known by what
it returns for numbers within and beyond the limit, compared in float64 with the formula, so that no
family's text is relied on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from ...ops.experts.gates import clamped
from ...ops.experts.parts import Gate
from ...utils.private import EXPERTS_GATE, ExpertsForm, transforms_active
from .mlp import activation_name

_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
Known = tuple[str, tuple[float, float, float]]  # (layout, (α, l, c))
# {((method, class of the activation), α, l): what it computes}
_known: dict[tuple[Any, float, float], Known | None] = {}


def gate_of(module: Any, form: ExpertsForm) -> Gate:
    """The gate that a module of the experts interface has."""
    act: Any = getattr(module, "act_fn", None)
    if not module.has_gate:
        return Gate(act, name_of(act), "alone")
    function = getattr(module, EXPERTS_GATE)
    if EXPERTS_GATE in module.__dict__:
        return Gate(function)
    if form.default_gate:
        return Gate(function, name_of(act))
    known = _clamped(module, function)
    return Gate(function) if known is None else Gate(function, None, known[0], known[1])


def name_of(act: Any) -> str | None:
    """The name of an activation, a module or a function, for kernels; None when it has none."""
    if hasattr(act.__class__, "forward"):
        return activation_name(act)
    return _FUNCTIONS.get(act)


def _clamped(module: Any, function: Any) -> Known | None:
    state = module.__dict__
    alpha = next((state[name] for name in _ALPHAS if name in state), 1.0)
    limit = next((state[name] for name in _LIMITS if name in state), None)
    if not isinstance(alpha, (int, float)) or not isinstance(limit, (int, float)):
        return None
    # an activation may be exchanged in one module and not in another
    key = (getattr(module.__class__, EXPERTS_GATE), getattr(module, "act_fn", None).__class__)
    try:
        return _known[key, float(alpha), float(limit)]
    except KeyError:
        if is_compiling() or transforms_active() or alpha <= 0 or limit <= 0:
            return None
    found = _known[key, float(alpha), float(limit)] = _found(function, float(alpha), float(limit))
    return found


def _found(function: Any, alpha: float, limit: float) -> Known | None:
    """The constants for which the formula gives what ``function`` does; None for no such."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        gu = torch.linspace(-3.0, 3.0, 8 * 64, dtype=torch.float64).mul_(limit)
        gu = gu[torch.arange(gu.numel()) * 229 % gu.numel()].view(8, 64)  # 229 is prime: all
        try:
            got = function(gu.clone())
        except Exception:  # it needs its module's device, dtype or width
            return None
        if not isinstance(got, Tensor) or got.shape != (8, 32) or got.dtype != gu.dtype:
            return None
        for layout in ("halves", "interleaved"):
            for plus in (0.0, 1.0):
                want = clamped(gu, layout, (alpha, limit, plus))
                if torch.allclose(got, want, 1e-12, 1e-12):
                    return layout, (alpha, limit, plus)
    return None
