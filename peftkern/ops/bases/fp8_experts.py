"""The experts of fp8 checkpoints, as transformers' ``FP8Experts`` holds them.

Weights are float8 [E, N, K] with a scale for each block (or one for each expert), or MXFP4 bytes
where the checkpoint says ``expert_dtype="fp4"``. The owner's forward rounds activations to fp8 as
well; here the dequantised weights multiply activations that are not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ...utils.private import EXPERTS_GATE
from .experts import FoundExperts, PackedExperts
from .formats import Unusable
from .fp8 import Fp8
from .fp8_numbers import cast_error, is_cast, quantised
from .fp8_numbers import shape_error as fp8_error
from .mx import Mx4
from .mx import shape_error as mx_error
from .repack import State

SCALES = {
    "gate_up_proj": "gate_up_proj_scale_inv",
    "up_proj": "up_proj_scale_inv",
    "down_proj": "down_proj_scale_inv",
}


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def shape_of(module: Any, name: str) -> tuple[int, int, int]:
    """[E, N, K] of the weights called ``name``, as numbers."""
    E, D, inner = module.num_experts, module.hidden_dim, module.intermediate_dim
    if name == "down_proj":
        return E, D, inner
    return E, (2 * inner if module.has_gate else inner), D


def read(module: Any) -> FoundExperts | str:
    """What the experts hold, or the reason that it cannot be read."""
    parts = []
    for name in _names(module):
        found = _part(module, name)
        if isinstance(found, str):
            return type(found)(f"{name}: {found}")
        parts.append(found)
    own, (first, _) = module._parameters, _names(module)
    gate = (getattr(module, EXPERTS_GATE), None, "halves", None)
    if not module.has_gate:
        gate = (module.act_fn, None, "alone", None)
    up_bias, down_bias = own.get(f"{first}_bias"), own.get("down_proj_bias")
    return FoundExperts(parts[0], parts[1], up_bias, down_bias, gate)


def _part(module: Any, name: str) -> PackedExperts | str:
    own = module._parameters
    q, scale = own.get(name), own.get(SCALES[name])
    if q is None or scale is None:
        return "it has no weights or no scales"
    if q.is_meta or scale.is_meta:
        return "its weights are on the meta device (offloaded or not loaded yet)"
    if q.dtype.itemsize != 1:
        return Unusable(cast_error(q)) if is_cast(q) else f"its weights are {q.dtype}"
    E, N, K = shape_of(module, name)
    fp4 = not q.dtype.is_floating_point
    if tuple(q.shape) != (E, N, K // 2 if fp4 else K):
        return f"its weights are of shape {tuple(q.shape)}, for {E} experts of {N} x {K}"
    held: tuple[Tensor, Tensor] = (q, scale)
    if fp4:
        if (reason := mx_error(q, scale)) is not None:
            return reason
        return PackedExperts(Mx4.format, (E, N, K), q.device, held, lambda e: Mx4(q[e], scale[e]))
    block = None if module.block_size is None else (module.block_size[0], module.block_size[1])
    if len(scale) != E:
        return f"its scales are of shape {tuple(scale.shape)}, for {E} experts"
    kind = "one scale" if block is None else f"in blocks of {block[0]} x {block[1]}"
    label = f"fp8 {kind} (transformers)"

    def of(expert: int) -> Fp8:
        return Fp8(q[expert], scale[expert], block, label, True)

    if (reason := fp8_error(q[0], scale[0], block)) is not None:
        return reason
    return PackedExperts(label, (E, N, K), q.device, held, of)


def cannot_repack(module: Any) -> str | None:
    """The reason that other weights cannot be quantised into the experts, or None."""
    first, _ = _names(module)
    if not module._parameters[first].dtype.is_floating_point:
        return "transformers makes no weights in FP4: it reads those of checkpoints"
    return None


def repacked(module: Any, weight: Tensor, name: str) -> State:
    """What the experts hold for other weights [E, N, K], by the rule of transformers' loader.

    Each block's scale is max |W| / 448, in E8M0 the next power of two.
    """
    q, scale = module._parameters[name], module._parameters[SCALES[name]]
    block = module.block_size or weight.shape[1:]
    new, inverse = torch.empty_like(q), torch.empty_like(scale)
    for expert, one in enumerate(weight):  # one at a time, as each is made float32 again
        made, its = quantised(one.to(q.device), (block[0], block[1]), scale.dtype)
        new[expert], inverse[expert] = made, its.reshape(scale[expert].shape)
    held = {
        name: Parameter(new, requires_grad=False),
        SCALES[name]: Parameter(inverse, requires_grad=False),
    }
    return State(held)
