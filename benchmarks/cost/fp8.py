"""A frozen base in fp8 in the counts: its layers on the meta device, and ways to quantise X and dY.

``quantize_base`` refuses weights without data, and products in fp8 a device that is no GPU; here
both are done as if there were one with compute capability 9.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..kernels.traffic import Traffic, nbytes
from .count import record

CAPABILITY = 90  # of the GPUs on which torch multiplies with block scales
# in the passes that read X and dY anyway; in a pass each of one kernel, which nobody ships here;
# by torch's operations, of several kernels each
FUSED, PASS, TORCH = "fused", "pass", "torch"
WAYS = (FUSED, PASS, TORCH)


def quantise(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the linear layers with these names by fp8 ones, as ``quantize_base`` does."""
    from peftkern.ops.bases.fp8 import CHOICE, IN_FP8
    from peftkern.ops.bases.fp8_linear import Fp8Linear

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in names:
            made = Fp8Linear(module)
            made.__dict__[CHOICE] = IN_FP8
            model.set_submodule(name, made)


def _one_pass(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a kernel that reads X [M, K] and writes it in fp8, with its scales."""
    from peftkern.kernels import fp8_rows

    copy = fp8_rows.empty(*x.shape, x.device)
    record([Traffic("quantise", 1, nbytes(x), nbytes(copy.q) + nbytes(copy.scales))])
    return copy.q, copy.scales


@contextlib.contextmanager
def way(how: str) -> Iterator[None]:
    """Within the block products in fp8 run, and X and dY are quantised in one of :data:`WAYS`."""
    from peftkern.ops import fp8_copies
    from peftkern.ops.bases import fp8_products

    def refused(device: torch.device, blocks: bool) -> Any:
        return None

    with contextlib.ExitStack() as stack:
        if how:
            stack.enter_context(mock.patch.object(fp8_products, "_device_why_not", refused))
        if how in (PASS, TORCH):
            stack.enter_context(
                mock.patch.object(fp8_copies, "order", lambda ws, how=None: how or "joined")
            )
        if how == PASS:
            stack.enter_context(mock.patch.object(fp8_products, "quantised_blocks", _one_pass))
        yield
