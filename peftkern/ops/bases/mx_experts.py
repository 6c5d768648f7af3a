"""gpt-oss' experts in MXFP4, as transformers' ``Mxfp4GptOssExperts`` holds them.

Read are the packed bytes of the checkpoint, uint8 [E, N, K / 2], with their scales. On a GPU
transformers gives them to its kernels in another layout, which is not read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..experts.gates import clamped
from .experts import FoundExperts, PackedExperts
from .mx import Mx4, shape_error

# where a parameter's scales are: a parameter, or in the configuration of transformers' kernels
SCALES = {
    "gate_up_proj": ("gate_up_proj_scales", "gate_up_proj_precision_config"),
    "down_proj": ("down_proj_scales", "down_proj_precision_config"),
}


def shape_of(module: Any, name: str) -> tuple[int, int, int]:
    """[E, N, K] of the weights called ``name``, as numbers."""
    E, D, inner = module.num_experts, module.hidden_size, module.intermediate_size
    return (E, 2 * inner, D) if name == "gate_up_proj" else (E, D, inner)


def read(module: Any) -> FoundExperts | str:
    """What the experts hold, or the reason that it cannot be read."""
    parts = []
    for name in ("gate_up_proj", "down_proj"):
        found = _part(module, name)
        if isinstance(found, str):
            return f"{name}: {found}"
        parts.append(found)
    own = module._parameters
    layout, clamp = "interleaved", (float(module.alpha), float(module.limit), 1.0)
    return FoundExperts(
        up=parts[0],
        down=parts[1],
        up_bias=own.get("gate_up_proj_bias"),
        down_bias=own.get("down_proj_bias"),
        gate=(partial(clamped, layout=layout, clamp=clamp), None, layout, clamp),
    )


OTHER_LAYOUT = (
    "its weights are in the layout of transformers' GPU kernels (swizzled by the package "
    "triton_kernels), which is not read; load the model with `Mxfp4Config(dequantize=True)`"
)


def other_layout(module: Any) -> str | None:
    """The reason that the module has no parameters to adapt, or None.

    transformers puts objects of triton_kernels, no tensors of torch, in the parameters' place.
    """
    swizzled = [n for n in SCALES if n not in module._parameters and n in module.__dict__]
    return OTHER_LAYOUT if swizzled else None


def cannot_repack(module: Any) -> str:
    """The reason that other weights cannot be quantised into the experts."""
    return "transformers makes MXFP4 weights with kernels for a GPU, in a layout that is not read"


def _part(module: Any, name: str) -> PackedExperts | str:
    own = module._parameters
    bits, scale = own.get(name), _scale(module, name)
    if bits is None:
        return other_layout(module) or "it has no weights"
    if bits.dtype != torch.uint8:
        return f"its weights are {bits.dtype}, not the checkpoint's bytes"
    if scale is None:
        return "it has no scales"
    if bits.is_meta or scale.is_meta:
        return "its weights are on the meta device (offloaded or not loaded yet)"
    E, N, K = shape_of(module, name)
    if tuple(bits.shape) != (E, N, K // 2):
        return f"its packed weights are of shape {tuple(bits.shape)}, allowed: {(E, N, K // 2)}"
    if (reason := shape_error(bits, scale)) is not None:
        return reason
    held: tuple[Tensor, Tensor] = (bits, scale)
    return PackedExperts(Mx4.format, (E, N, K), bits.device, held, lambda e: Mx4(bits[e], scale[e]))


def _scale(module: Any, name: str) -> Tensor | None:
    """The scales, a parameter or in the configuration of the kernels."""
    found = module._parameters.get(SCALES[name][0])
    if found is None:
        found = getattr(getattr(module, SCALES[name][1], None), "weight_scale", None)
    return found if isinstance(found, Tensor) else None
