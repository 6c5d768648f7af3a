"""Quantising a merged weight again into a layer of compressed-tensors, by its compressor.

The scales of such a layer may come from calibration data, which a merge does not have. Each scale
(and zero point) is the one that the layer has, or the one that the owner finds from the extremes,
whichever makes its part of the weight nearer to the sum: a weight that did not change keeps its
numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.parameter import Parameter


def _compressor(module: Any) -> Any:
    base: Any = importlib.import_module("compressed_tensors.compressors.base")
    scheme = module.__dict__["quantization_scheme"]
    form = scheme.format or base.infer_module_format(type(module), scheme)
    return base.BaseCompressor.get_value_from_registry(getattr(form, "value", form))


def _parts(w: Tensor, a: Any) -> Tensor:
    """``w`` [N, K] as [..., elements of a scale]; the last blocks are filled up with zeros."""
    if a.strategy == "tensor":
        return w.reshape(1, -1)
    if a.strategy == "channel":
        return w
    if a.strategy != "block":
        groups: Tensor = w.unflatten(1, (-1, a.group_size))
        return groups
    rows, columns = a.block_structure
    w = pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
    tiles = w.view(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    return tiles.transpose(1, 2).flatten(2)


@torch.no_grad()
def packed_anew(module: Any, weight: Tensor) -> dict[str, Parameter]:
    """All parameters but the bias of a compressed layer for another weight [N, K], float32.

    The layer is not changed.
    """
    compressor, scheme = _compressor(module), module.__dict__["quantization_scheme"]
    own: Any = module._parameters | module._buffers
    held = {name: t for name, t in own.items() if t is not None and name != "bias"}
    a = scheme.weights
    state = compressor.decompress({n: t.detach() for n, t in held.items()}, scheme)
    old = (state["weight_scale"].detach(), state.get("weight_zero_point"))
    parts = _parts(weight, a)
    utils: Any = importlib.import_module("compressed_tensors.quantization.utils")
    whole = state.get("weight_global_scale")
    if whole is not None:  # NVFP4's scale of all scales, for the largest number that it can hold
        wider = utils.generate_gparam(weight.amin(), weight.amax()).to(whole)
        wider = torch.where(wider < 0.99 * whole, wider, whole)  # more than rounding
        old = (old[0] * (wider / whole).to(old[0].dtype), old[1])
        state["weight_global_scale"] = whole = wider
    found = utils.calculate_qparams(parts.amin(-1), parts.amax(-1), a, whole)
    like = old[0]
    new = (found[0].reshape(like.shape).to(like.dtype), found[1].reshape(like.shape))
    if old[1] is None:
        new = (new[0], None)
    else:
        new = (new[0], new[1].to(old[1].dtype))

    def compressed(scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        given = {**state, "weight": weight, "weight_scale": scale}
        if zero is not None:
            given["weight_zero_point"] = zero
        result: dict[str, Tensor] = compressor.compress(given, scheme)
        return result

    def errors(scale: Tensor, zero: Tensor | None) -> Tensor:
        dense = compressor.decompress(compressed(scale, zero), scheme)["weight"].float()
        return _parts((dense - weight).square_(), a).sum(-1).reshape(like.shape)

    better = errors(*new) < errors(*old)
    zero = None if old[1] is None or new[1] is None else torch.where(better, new[1], old[1])
    made = compressed(torch.where(better, new[0], old[0]), zero)
    return {
        name: Parameter(made.get(name, t).detach().to(t.device, t.dtype), requires_grad=False)
        for name, t in held.items()
        if name in module._parameters
    }
