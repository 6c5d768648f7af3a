"""Whether torch records the operations of a call, to run them again with other inputs.

Then a call is made of torch's own operations, one after the other, and nothing is decided by the
values in a tensor: ``torch.compile`` looks into no ``autograd.Function`` of ours that it need not,
``torch.jit.trace`` and the older ONNX exporter write what such a one does down as constants.
"""

from __future__ import annotations

from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

__all__ = ["is_compiling", "is_recording", "is_tracing"]


def is_recording() -> bool:
    """Whether ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or the older ONNX exporter
    (``torch.onnx.export(dynamo=False)``) records this call."""
    return is_compiling() or is_tracing()
