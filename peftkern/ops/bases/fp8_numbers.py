"""Numbers in 8-bit floating point with a scale for each tensor, row or block: in and out.

quantised    s_b = max |W_b| / 448,  q = round(W / s)    |q s - W| <= max(2^-4 |W|, 2^-10 s)
back         W_nk = q_nk · s_(n // bn, k // bk)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tracing import is_compiling

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def quantised(
    w: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Numbers as e4m3 with a scale for each block: the one rule of all that this package makes.

    Args:
        w: [R, C], floating point.
        block: the rows and columns of a block; the last ones may be smaller.
        dtype: of the scales: float32, or one of exponents alone (E8M0), where they are the next
            powers of two.

    Returns:
        (q [R, C] in e4m3, scales [ceil(R / rows), ceil(C / columns)]).
    """
    (R, C), (rows, columns) = w.shape, block
    wide = pad(w.float(), (0, -C % columns, 0, -R % rows))
    tiles = wide.view(wide.shape[0] // rows, rows, wide.shape[1] // columns, columns)
    largest = tiles.abs().amax((1, 3))
    # 2^-126 keeps the quotients of the smallest blocks finite; a block of zeros gets the scale 1
    scale = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = scale.masked_fill_(largest == 0, 1.0)
    if dtype != torch.float32:
        scale = torch.exp2(scale.log2_().ceil_()).to(dtype)
    q = (tiles / scale.float()[:, None, :, None]).clamp_(-LARGEST, LARGEST).view_as(wide)
    return q[:R, :C].to(E4M3).contiguous(), scale


def numbers(q: Tensor, dtype: torch.dtype) -> Tensor:
    """The float8 numbers of ``q`` [N, K], unscaled, in float32 or float64: a new tensor.

    On a CPU torch converts float8 one element at a time. An e4m3 number is a float16 one with four
    bits of exponent and three of mantissa, times 2^8 for the bias, and that conversion is a vector
    instruction.
    """
    if q.dtype != E4M3 or not q.is_cpu or is_compiling():
        return q.to(dtype)
    signed = q.view(torch.int8)
    if q.numel() == 0 or (signed & 127).amax() == 127:  # a NaN, which float16 would take for 480
        return q.to(dtype)
    half = signed.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-16385)  # all but bit 14
    return half.view(torch.float16).to(dtype).mul_(256.0)


def scale_(w: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """``w`` [N, K] times its scales, in place; the shapes are those of :class:`.fp8.Fp8`."""
    if block is None:
        return w.mul_(scale if scale.numel() > 1 else scale.reshape(()))
    rows, columns = block
    N, K = w.shape
    if scale.numel() == 1:
        return w.mul_(scale.reshape(()))
    whole, rest = divmod(K, columns)
    if rest == 0 and N % rows == 0:
        w.view(N // rows, rows, whole, columns).mul_(scale[:, None, :, None])
        return w
    spread = scale.repeat_interleave(rows, 0)[:N]  # [N, ceil(K / columns)]
    w[:, : whole * columns].unflatten(1, (whole, columns)).mul_(spread[:, :whole, None])
    if rest:
        w[:, whole * columns :].mul_(spread[:, whole:])
    return w


def shape_error(q: Tensor, scale: Tensor, block: tuple[int, int] | None) -> str | None:
    """The reason that scales do not fit a weight, or None."""
    N, K = q.shape
    wanted = (N, 1) if block is None else (-(-N // block[0]), -(-K // block[1]))
    if scale.numel() == 1 and (block is None or wanted == (1, 1)):
        return None
    if tuple(scale.shape) != wanted:
        return f"its scales are of shape {tuple(scale.shape)}, and {wanted} would fit its weight"
    return None


def is_cast(w: Tensor) -> bool:
    """True when a dense weight [N, K] looks like e4m3 numbers that a model's cast has widened.

    That is when each of up to 4096 of its elements, spread over it, is an e4m3 number and not all
    are zero. Of bf16 numbers about one in 16 is one.
    """
    flat = w.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 4096)].float()
    if not bool(some.any()):
        return False
    return bool((some.clamp(-LARGEST, LARGEST).to(E4M3).float() == some).all())


def cast_error(w: Tensor) -> str:
    """The words for :func:`is_cast`, and for any wide weight where fp8 and scales must be."""
    return (
        f"its fp8 numbers are {w.dtype} now: a cast of the model (`.to(dtype)`, `.half()`, "
        "`.float()`) has made weights of them without their scales. Load the model again and do "
        "not cast it, or cast with `cast_mixed_precision_params`"
    )
