"""The random numbers that A and B start with: with the same seed HF PEFT's, bit for bit.

PEFT makes ``nn.Linear`` modules in the default dtype on the default device, which draws both
weights, and then draws A once more. These functions draw in the same order. As in PEFT, the numbers
are rounded to the base weight's dtype before they are cast to the adapter's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_GAIN = math.sqrt(3.0) * nn.init.calculate_gain("leaky_relu", math.sqrt(5))


def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """The values that torch draws for the weight of a linear layer or a convolution."""
    bound = _GAIN / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


def of_linear(
    r: int, K: int, N: int, init: bool | str, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(A [r, K], B [N, r], B's bias [N] or None).

    ``init``: True (B is zero), False (all at random), "gaussian" (A normal with standard deviation
    1/r, B zero); other names as True, but A is drawn once.
    """
    A, B = uniform((r, K), K), uniform((N, r), r)
    bias = torch.empty(N).uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r)) if with_bias else None
    if init is False:
        return A, B, bias
    if init == "gaussian":
        A.normal_(std=1 / r)
    elif init is True:
        A = uniform((r, K), K)
    return A, B.zero_(), None if bias is None else bias.zero_()


def placed(value: Tensor, base: torch.dtype, place: dict[str, Any]) -> Tensor:
    """``value`` in the dtype and on the device of ``place``, rounded to the dtype ``base`` before.

    ``base`` is the base weight's; there is no rounding if it has 8 bits or is no float.
    """
    if base.is_floating_point and base.itemsize > 1:
        value = value.to(base)
    return value.to(**place)
