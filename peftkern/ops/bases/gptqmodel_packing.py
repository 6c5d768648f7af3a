"""Quantising a merged weight again into gptqmodel's layers, by its ``Quantizer`` and ``pack``.

GPTQ and AWQ choose codes and scales with calibration data, which a merged model does not have. Each
group of each row takes one of two grids, whichever is nearer to the merged weight: the calibrated
one that it has, or the one that gptqmodel's quantiser finds from the group's extremes. So a weight
that did not change keeps its codes, and codes are the nearest ones of the grid.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def cannot_pack(module: Any) -> str | None:
    """The reason that the layer's owner cannot pack another weight into it, or None."""
    owner = {c.__module__.partition(".")[0] for c in type(module).__mro__}
    if "gptqmodel" in owner and (hasattr(module, "pack_original") or hasattr(module, "pack")):
        return None
    return f"a {type(module).__name__} has no function that packs another weight"


@torch.no_grad()
def packed_anew(
    module: Any, weight: Tensor, groups: Tensor, scales: Tensor, zeros: Tensor, first: bool = False
) -> dict[str, Tensor]:
    """The buffers of a layer of gptqmodel for another weight.

    Args:
        module: the layer; it is not changed.
        weight: [N, K], float32.
        groups: the group of each input, int64 [K].
        scales: the scales that it has, [G, N].
        zeros: its zero points, as they are subtracted from codes, [G, N].
        first: zero points are stored less 1 (GPTQ's first format).

    Returns:
        ``qweight``, ``qzeros`` and ``scales``, on the layer's device.
    """
    top = 2**module.bits - 1
    W, groups = weight.cpu(), groups.cpu()  # the owner packs on the host
    held = _Grid(scales.t().cpu().float(), zeros.t().cpu().float(), groups, top)
    extremes = _extremes(module, W, groups, held.scale.shape[1])
    scale = extremes[0].to(torch.float16).float()  # as it will be kept
    new = _Grid(scale, extremes[1].clamp(0, top), groups, top)
    better = new.errors(W) < held.errors(W)
    grid = _Grid(
        torch.where(better, new.scale, held.scale),
        torch.where(better, new.zero, held.zero),
        groups,
        top,
    )
    # packed are numbers of the grid, so that the owner's rounding finds their codes again
    stored = grid.zero
    if first:
        stored = (stored.to(torch.int32) - 1).bitwise_and(top).float()
    numbers = grid.scale[:, groups] * (grid.codes(W) - stored[:, groups])
    source = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    source.weight = nn.Parameter(numbers, requires_grad=False)
    loose: Any = module.__class__.__new__(module.__class__)
    loose.__dict__ = {**module.__dict__, "_buffers": dict(module._buffers)}
    pack = getattr(loose, "pack_original", loose.pack)
    pack(source, grid.scale, stored, g_idx=groups.to(torch.int32))
    # it packs in inference mode, whose tensors take no part in training
    device = module.qweight.device
    found = {name: getattr(loose, name).clone().to(device) for name in ("qweight", "qzeros")}
    return {**found, "scales": grid.scale.t().contiguous().to(device, module.scales.dtype)}


class _Grid:
    """Numbers scale · (code - zero), with scale and zero [N, G], and the group of each input."""

    def __init__(self, scale: Tensor, zero: Tensor, groups: Tensor, top: int) -> None:
        self.scale, self.zero, self.groups, self.top = scale, zero, groups, top

    def codes(self, W: Tensor) -> Tensor:
        """The nearest codes [N, K]."""
        scale, zero = self.scale[:, self.groups], self.zero[:, self.groups]
        return (W / scale).round_().add_(zero).clamp_(0, self.top)

    def errors(self, W: Tensor) -> Tensor:
        """The squared error of each group of each row, [N, G]."""
        numbers = self.codes(W).sub_(self.zero[:, self.groups]).mul_(self.scale[:, self.groups])
        return torch.zeros_like(self.scale).index_add_(1, self.groups, numbers.sub_(W).square_())


def _extremes(module: Any, W: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(scales, zeros) [N, G] of the owner's quantiser for each group."""
    owner: Any = importlib.import_module("gptqmodel.quantization.quantizer")
    settings = SimpleNamespace(bits=module.bits, sym=bool(module.sym), mse=0.0)
    quantizer = owner.Quantizer(settings)
    quantizer.configure(perchannel=True)
    found = []
    for group in range(count):
        quantizer.find_params(W[:, groups == group], weight=True)
        found.append((quantizer.scale, quantizer.zero))
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, 1), torch.cat(zeros, 1)
