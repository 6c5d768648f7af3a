"""The bytes that one step of a kernel's main loop loads, for the model of time.

A rule gets the facts of a launch as the rules of traffic do. A kernel without a rule here is
modelled from its shared memory, which holds the pipeline's tiles.
"""

from __future__ import annotations

from collections.abc import Callable

from ..kernels.traffic import Facts


def _adapters(f: Facts) -> int:
    """Bytes of one column of all A of a group."""
    return sum(r * a.element_size() for r, a in zip(f["ranks"], f["As"], strict=True))


def _shrink(f: Facts) -> int:
    return f["BLOCK_K"] * (f["BLOCK_M"] * f["x"].element_size() + _adapters(f))


def _grad_a(f: Facts) -> int:
    return f["BLOCK_M"] * (f["BLOCK_K"] + sum(f["ranks"])) * f["x"].element_size()


def _grad_xa(f: Facts) -> int:
    return _grad_a(f) + f["BLOCK_K"] * _adapters(f)


def _grad_sb(f: Facts) -> int:
    rank = min(f["R"], f["BLOCK_R"])
    return f["BLOCK_N"] * (f["BLOCK_M"] * f["dy"].element_size() + rank * f["b"].element_size())


def _gemm(f: Facts) -> int:
    y = getattr(f["y"], "base", f["y"])  # the tensor of a descriptor
    return (f["BLOCK_M"] + f["BLOCK_N"]) * f["BLOCK_K"] * y.element_size()


def _decode(f: Facts) -> int:
    As, ranks = f.get("As", (f.get("a"),)), f.get("ranks", (f.get("R"),))
    low = ranks[0] * As[0].element_size() if f["s"] is None else 0
    return f["BLOCK_K"] * ((f["BLOCK_N"] + f.get("M", 1)) * f["x"].element_size() + low)


def _keys(f: Facts) -> int:
    """A tile of keys and one of values."""
    return 2 * f["BLOCK_N"] * f["D"] * f["q"].element_size()


STEPS: dict[str, Callable[[Facts], int]] = {
    "_shrink_kernel": _shrink,
    "_shrink_expand_kernel": _shrink,
    "_grad_a_kernel": _grad_a,
    "_grad_xa_kernel": _grad_xa,
    "_grad_sb_kernel": _grad_sb,
    "_gemm_kernel": _gemm,
    "_gemv_kernel": _decode,
    "_rows_kernel": _decode,
    "_decode_kernel": _keys,
    "_attend_kernel": _keys,
    "_sum_kernel": lambda f: f["BLOCK"] * 4,
    "_merge_kernel": lambda f: f["D"] * 4,
}
