"""What a kernel's main loop does at a time, for the model: bytes of one step, pieces, integers.

A rule gets the facts of a launch as the rules of traffic do. A kernel without a rule in
:data:`STEPS` is modelled from its shared memory, which holds the pipeline's tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..kernels.traffic import Facts, cdiv


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


def _tiles(f: Facts) -> int:
    return cdiv(f["M"], f["BLOCK_M"]) * cdiv(f["N"], f["BLOCK_N"])


def _decode(f: Facts) -> int:
    low = f["R"] * f["a"].element_size() if f["s"] is None else 0
    return f["BLOCK_K"] * ((f["BLOCK_N"] + f.get("M", 1)) * f["x"].element_size() + low)


def _keys(f: Facts) -> int:
    """A tile of keys and one of values."""
    return 2 * f["BLOCK_N"] * f["D"] * f["q"].element_size()


def _bits(f: Facts) -> int:
    """Integer operations of all words.

    A word is DIGITS random words, each with one operation that adds its digit; a round of Philox is
    two wide products, two high halves and four exclusive ors, and its rounds make four words.
    """
    return math.prod(f["out"].shape) * f["DIGITS"] * (8 * f["ROUNDS"] // 4 + 1)


Step = Callable[[Facts], int]
# bytes that one step of the main loop loads
STEPS: dict[str, Step] = {
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
# kernels that write within that loop; others write after their last load
STREAMS = {"_grad_xa_kernel", "_scale_grad_kernel", "_grad_sb_kernel"}
# kernels that read only what a launch just before them has written: they find it in L2
NEAR = {"_sum_kernel", "_merge_kernel", "_root_kernel"}
# equal pieces of work, where the programs of a persistent grid do several one after another
PIECES: dict[str, Step] = {"_gemm_kernel": _tiles}
# integer operations of kernels whose time they are
INTEGERS: dict[str, Step] = {"_bits_kernel": _bits}
