"""Queries of whether torch records the operations of a call, to run them with other inputs.

A recorded call uses only torch's own operations, one after the other, and no decision depends on
the values in a tensor. So ``torch.compile`` need not look into our ``autograd.Function`` classes,
whose work ``torch.jit.trace`` and the older ONNX exporter would record as constants.
"""

from __future__ import annotations

from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

__all__ = ["is_compiling", "is_recording", "is_tracing"]


def is_recording() -> bool:
    """True while torch records this call, by any of its tracers.

    They are ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and the older ONNX exporter
    (``torch.onnx.export(dynamo=False)``).
    """
    return is_compiling() or is_tracing()
