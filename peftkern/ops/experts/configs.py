"""The configs that a tuning table has for the kernels of a mixture, by the facts of its call."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import tuned
from .parts import Call, ExpertLinear

_OF_GATES = ("experts_gate", "experts_gate_grad")


def told(op: str, rows: int, gather: bool, layout: str) -> str:
    """What the key of a kernel's entry has beside numbers, so that a config fits where it is used.

    ``rows``: of the route's tiles, which a config does not choose, and on which registers and
    shared memory depend. ``gather``: rows of X or dY are by token. ``layout``: the gate's.
    """
    if op == "experts_decode":
        return layout
    return f"{rows} {layout if op in _OF_GATES else 'gather' if gather else 'rows'}"


class Configs(NamedTuple):
    """The configs of one call, whose route has tiles of ``rows`` rows; 0 without a route."""

    call: Call
    rows: int

    def of(
        self, op: str, part: ExpertLinear, n: int, k: int, *,
        gather: bool = False, masked: bool = False,
    ) -> Any:  # fmt: skip
        """The config of a kernel for the adapters of ``part``; None for the kernel's default."""
        call = self.call
        E, top = call.experts, call.chosen.shape[1]
        group = 1 if call.choice is None else call.adapters + 1
        factors = [f for f in part.factors if f.A.shape[0]]
        r = max((f.rank(E) for f in factors), default=0)
        low = factors[0].A.dtype if factors else call.x.dtype
        what = told(op, self.rows, gather, call.gate.layout)
        return tuned.config(op, call.x, low, n, k, r, group, masked, what, E, top)
