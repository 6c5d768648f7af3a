"""Parametrizations W -> W with adapters, of parameters that are no operation of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Proxy(nn.Module):
    """A parametrization W -> W + update, set on a parameter for the time of one call."""

    # True: torch's registration calls the parametrization once, to check dtype and shape. W is
    # returned then, without computing the sum over all experts.
    registering = True

    def updated(self, W: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, W: Tensor) -> Tensor:
        return W.view_as(W) if self.registering else self.updated(W)


class _LoraFactorsProxy(_Proxy):
    """W + scaling · left @ right for one adapter.

    One product for each expert adds to W directly, so that the update is never a separate tensor.
    """

    def __init__(self, left: Tensor, right: Tensor, scaling: float) -> None:
        super().__init__()
        self.left, self.right, self.scaling = left, right, scaling

    def updated(self, W: Tensor) -> Tensor:
        # without autocast, so that the result keeps W's dtype
        with torch.autocast(device_type=W.device.type, enabled=False):
            product = torch.addmm if W.dim() == 2 else torch.baddbmm
            return product(W, self.left, self.right, alpha=self.scaling)


class _LoraParameterProxy(_Proxy):
    """W + delta for several adapters or an 8-bit weight, summed in the delta's dtype."""

    def __init__(self, delta_weight: Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def updated(self, W: Tensor) -> Tensor:
        delta = self.delta_weight
        if W.dtype.itemsize > 1:
            return W + delta
        info = torch.finfo(W.dtype)  # casting larger values to 8 bits gives NaN
        return (W.to(delta.dtype) + delta).clamp(info.min, info.max).to(W.dtype)


class _StepsProxy(_Proxy):
    """Adapters one after the other: each adds its product, and DoRA's multiply by their gain.

    ``steps`` has (left, right, scaling, gain or None) for each of them.
    """

    def __init__(self, steps: Sequence[tuple[Tensor, Tensor, float, Tensor | None]]) -> None:
        super().__init__()
        self.steps = steps

    def updated(self, W: Tensor) -> Tensor:
        narrow = W.dtype.itemsize == 1
        whole = W.to(self.steps[0][0].dtype) if narrow else W
        with torch.autocast(device_type=W.device.type, enabled=False):
            product = torch.addmm if W.dim() == 2 else torch.baddbmm
            for left, right, scaling, gain in self.steps:
                left, right = left.to(whole.dtype), right.to(whole.dtype)
                whole = product(whole, left, right, alpha=scaling)
                if gain is not None:
                    # each element is rounded once; a rounded gain would err by the same in a row
                    whole = torch.addcmul(whole, whole, (gain - 1).to(whole.dtype))
        if narrow:
            info = torch.finfo(W.dtype)
            whole = whole.clamp(info.min, info.max).to(W.dtype)
        return whole
