"""The kernels: for each file of this folder, its ops in tuning tables (:mod:`.tuning`).

Each op has the class of its configs. A file whose kernels are not tuned has no ops. The file of the
same name in ``benchmarks/kernels/`` has the proofs and measurements of a kernel.
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
    "mlp": {"mlp": "MlpConfig"},
    "mlp_grad": {"mlp_grad": "MlpGradConfig"},
    "experts_gate": {"experts_gate": "ExpertsGateConfig"},
    "experts_gate_grad": {"experts_gate_grad": "ExpertsGateGradConfig"},
    "experts_decode": {"experts_decode": "ExpertsDecodeConfig"},
    "mixed": {"mixed_rows": "MixedConfig"},
    "experts_route": {},
    "experts_shrink": {"experts_shrink": "ExpertsShrinkConfig"},
    "experts_grad": {
        "experts_grad_sb": "ExpertsGradConfig",
        "experts_grad_a": "ExpertsGradConfig",
    },
    "experts_gemm": {
        "experts_gemm": "ExpertsGemmConfig",
        "experts_gemm_grad_input": "ExpertsGemmConfig",
    },
    "experts_combine": {},
    "reduce": {},
    "decode_quantised": {},
    "dequantise": {},
    "dora_norm": {},
    "dora_grad": {},
    "prefix_attention": {},
    "prefix_backward": {},
    "prefix_decode": {},
}
OPS = tuple(op for ops in KERNELS.values() for op in ops)


def config_class(op: str) -> Any:
    """The class of the configs that a table holds for ``op``, one of :data:`OPS`."""
    ((name, ops),) = ((name, ops) for name, ops in KERNELS.items() if op in ops)
    return getattr(importlib.import_module(f"{__package__}.{name}"), ops[op])
