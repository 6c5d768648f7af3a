"""The kernels, a line each: the file of this folder, and the ops of tuning tables (:mod:`.tuning`)
that its configs serve, each with the class of config. A file whose kernels no table tunes has none.

What is proved and measured of a kernel stands in the file of the same name in
``benchmarks/kernels/``.
"""

from __future__ import annotations

import importlib
from typing import Any

KERNELS: dict[str, dict[str, str]] = {
    "bits": {},
    "shrink": {"shrink": "ShrinkConfig"},
    "expand": {"expand": "ExpandConfig", "low_rank_grad_input": "ExpandConfig"},
    "shrink_expand": {"shrink_expand": "ShrinkExpandConfig"},
    "grad_sb": {"grad_sb": "GradSBConfig"},
    "grad_a": {"grad_a": "GradAConfig"},
    "grad_xa": {"grad_xa": "GradXAConfig"},
    "gemm": {"gemm": "GemmConfig", "gemm_grad_input": "GemmConfig"},
    "decode": {"decode": "DecodeConfig"},
    "mixed": {},
    "reduce": {},
    "dora_norm": {},
    "dora_grad": {},
    "prefix_attention": {},
    "prefix_backward": {},
    "prefix_decode": {},
}
OPS = tuple(op for ops in KERNELS.values() for op in ops)


def config_class(op: str) -> Any:
    """The class of config that a table holds for ``op``, one of :data:`OPS`."""
    ((name, ops),) = ((name, ops) for name, ops in KERNELS.items() if op in ops)
    return getattr(importlib.import_module(f"{__package__}.{name}"), ops[op])
