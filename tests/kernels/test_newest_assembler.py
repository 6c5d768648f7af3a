"""Default configs that the assembler of triton 3.9 needs: it spills registers in others.

Ring 3 compiles under the installed Triton alone, and most of these spill nothing under 3.6. So the
config of each such launch stands here; docs/versions.md says how to compile them by the newest.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.static.judging import TARGETS
from peftkern.kernels import (
    experts_grad,
    gemm,
    grad_a,
    grad_xa,
    mixed_config,
    mlp,
    mlp_grad,
    prefix_attention,
)

M = 8192


def _chosen(name: str) -> Any:
    kind, arch = name.split(" on ")
    on = TARGETS[arch].arch
    return {
        "prefix, causal, D=64": lambda: prefix_attention.default_config(64, on, causal=True),
        "prefix, masked, D=96": lambda: prefix_attention.default_config(96, on, hidden=True),
        "grad_a, r=128": lambda: grad_a.default_config(M, 4096, on, (128,)),
        "grad_xa, fp32": lambda: grad_xa.default_config(M, 4096, (16,), on, 4),
        "gemm": lambda: gemm.default_config(M, 4096, on),
        "mixed, r=5": lambda: mixed_config.default_config(256, 4096, 4096, 1, (5,) * 8, on),
        "fp8 mlp with parts": lambda: mlp.default_config(
            M, 14336, 16, on, copied=True, crowded=True
        ),
        "fp8 mlp's gradient": lambda: mlp_grad.default_config(
            M, 14336, 16, on, 2, masked=False, copied=True
        ),
        "experts' dA, r=128": lambda: experts_grad.default_config(
            256, 768, 128, 128, on, 2, masked=True
        ),
    }[kind]()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *(
            (f"prefix, causal, D=64 on {arch}", {"block_n": 16, "num_warps": 4, "num_stages": 3})
            for arch in ("sm_80", "sm_86", "sm_89", "sm_120")
        ),
        ("prefix, masked, D=96 on sm_120", {"block_n": 16, "num_warps": 8}),
        ("grad_a, r=128 on sm_89", {"block_k": 32, "num_warps": 4}),
        ("grad_a, r=128 on sm_120", {"block_k": 32, "num_warps": 4}),
        ("grad_xa, fp32 on sm_120", {"block_k": 32, "num_warps": 8}),
        ("gemm on sm_120", {"block_k": 64, "num_stages": 3}),
        ("mixed, r=5 on sm_89", {"block_m": 128, "finish_n": 16}),
        ("fp8 mlp with parts on sm_90", {"block_m": 16}),
        ("fp8 mlp's gradient on sm_90", {"num_warps": 8}),
        ("experts' dA, r=128 on sm_80", {"block_c": 64, "num_warps": 4}),
    ],
)
def test_config(name: str, wanted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_SPILLS_WITH_32", True)  # Triton 3.6 does not
    found = _chosen(name)
    assert {key: getattr(found, key) for key in wanted} == wanted
