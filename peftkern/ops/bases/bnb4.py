"""NF4 and FP4 as bitsandbytes packs them (Dettmers et al., 2023, arXiv 2305.14314, section 3).

    w_i = code[q_i] · absmax[i // blocksize]     two 4-bit q in a byte, the first in its high half

With nested statistics absmax is itself quantised, in blocks of 256: absmax = code2[q2] · absmax2 +
offset. A ``Linear4bit`` keeps all this in its weight's ``quant_state``, and in its own, which is
left when FSDP has replaced the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...utils.private import DisabledTorchFunction
from . import bnb4_kernel
from .bnb4_cpu import repacked_bits
from .formats import Found, Unusable
from .repack import State
from .weight import Packed

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = ("nf4", "fp4")


class Bnb4(Packed):
    """A weight of ``bitsandbytes.nn.Linear4bit``."""

    __slots__ = ("weight", "bits", "state", "module", "turned", "shape", "device")

    def __init__(self, weight: Tensor, bits: Tensor, state: Any, module: Any, turned: bool) -> None:
        self.weight, self.bits = weight, bits  # the layer's own object, and it as a plain tensor
        self.state, self.module, self.turned = state, module, turned
        self.shape, self.device = (module.out_features, module.in_features), bits.device

    @property
    def format(self) -> str:  # type: ignore[override]
        kept = bnb4_kernel.describe(self.module)
        return f"{self.state.quant_type.upper()} (bitsandbytes{kept})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        state = self.state
        held = (self.weight, state.absmax)
        return held + ((state.state2.absmax, state.offset) if state.nested else ())

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        module = self.module
        # without a given one the layer's first forward would decide for x's
        given = module.compute_dtype if module.compute_type_is_set else None
        return dtype if given is None else given

    def dense(self, dtype: torch.dtype) -> Tensor:
        state = self.state
        narrow = dtype if dtype in _DTYPES else torch.float32
        w = _dequantised(self.bits, self.absmax(), state, narrow)
        w = w if narrow == dtype else w.to(dtype)
        return w.t().contiguous() if self.turned else w

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        if self.module.training:
            bnb4_kernel.forget(self.module)
        return super().product(x, y)

    def infer(self, x: Tensor) -> Tensor:
        y = bnb4_kernel.product(self, x)
        return self.product(x, None) if y is None else y

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import bnb4

        state = self.state
        if self.turned:
            return "its weight [K, N] was quantised"
        if self.shape[1] % 2:
            return f"its {self.shape[1]} inputs are an odd number"
        nested = None
        if state.nested:
            inner = state.state2
            if inner.dtype != torch.float32:
                return f"its statistics are computed in {inner.dtype}"
            nested = inner.absmax, inner.code, state.offset, inner.blocksize
        elif state.absmax.dtype != torch.float32:
            return f"its statistics are {state.absmax.dtype}"
        return bnb4(self.bits.data, state.code, state.absmax, self.shape, state.blocksize, nested)

    def absmax(self) -> Tensor:
        """The scale of each block, float32."""
        state = self.state
        absmax: Tensor = state.absmax
        if state.nested:
            inner = state.state2
            if inner.dtype == torch.float32 and absmax.numel() % inner.blocksize == 0:
                # what the owner's operator computes, in less time for so few numbers
                blocks = inner.code[absmax.int()].view(-1, inner.blocksize)
                absmax = blocks.mul_(inner.absmax.view(-1, 1)).view(absmax.shape)
            else:
                absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
                    absmax, inner.absmax, inner.code, inner.blocksize, inner.dtype
                )
            absmax = absmax + state.offset
        return absmax if absmax.dtype == torch.float32 else absmax.float()


class Repacked4(Bnb4):
    """One whose bytes bitsandbytes has put into another order, for a processor with AVX512-BF16.

    It does so in place, in an eval forward of its layer, and rounds the scales to bfloat16. Its own
    way back leaves statistics that are not nested in the wrong order, so the bytes are sorted here.
    """

    __slots__ = ()

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"{self.state.quant_type.upper()} (bitsandbytes, repacked for this processor)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.weight, self.state.absmax

    def infer(self, x: Tensor) -> Tensor:
        if bnb4_kernel.applies(self, x):
            return bnb4_kernel.kernel(x, self.bits, self.state.absmax, self.state)
        return self.product(x, None)

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        return "its bytes are in an order for this processor"

    def absmax(self) -> Tensor:
        absmax: Tensor = self.state.absmax
        return absmax.t().float().reshape(-1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        narrow = dtype if dtype in _DTYPES else torch.float32
        w = _dequantised(repacked_bits(self.bits), self.absmax(), self.state, narrow)
        return w if narrow == dtype else w.to(dtype)


def _dequantised(bits: Tensor, absmax: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    shape, blocksize = state.shape, state.blocksize
    if bits.is_cpu and (shape[-1] % 2 or blocksize >= 2048):
        # the owner compiles a formula for these, for each shape anew
        return _by_formula(bits, absmax, state.code, blocksize, shape, dtype)
    w: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        bits, absmax, blocksize, state.quant_type, shape, dtype
    )
    return w


def _by_formula(
    bits: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Any, dtype: torch.dtype
) -> Tensor:
    packed, count = bits.view(torch.uint8).view(-1), shape.numel()
    halves = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:count]
    scales = absmax.repeat_interleave(blocksize)[:count]
    return code.float()[halves.int()].mul_(scales).to(dtype).view(shape)


def read(module: Any) -> Found | str:
    """The weight of a ``Linear4bit``, or the reason that it cannot be read."""
    held = module._parameters
    if "weight" not in held:  # FSDP1 keeps what it has gathered as attributes
        held = module.__dict__
    weight = held.get("weight")
    # every method of a Params4bit goes through Python twice; this is the same tensor without that
    bits = None if weight is None else _plain(weight)
    if bits is None or bits.is_meta:
        return Unusable("its weight is on the meta device (offloaded or not loaded yet)")
    state = weight.__dict__.get("quant_state")
    if state is None:
        state = module.__dict__.get("quant_state")
    if state is None:
        return Unusable(
            "its 4-bit weight has no statistics: it is quantised when it is moved to a device"
        )
    repacked = getattr(state, "packing_format_for_cpu", False)
    why = _mismatch(module, bits, state)
    stored = getattr(weight, "quant_storage", bits.dtype)
    if why is None and bits.dtype != stored and bits.is_floating_point():  # repacked: uint8
        why = Unusable(
            f"its 4-bit weight is packed in {stored}, and a cast of the model (`.to(dtype)`, "
            f"`.half()`) has made it {bits.dtype}, so that its bits are lost: load it again, or "
            "cast with `cast_mixed_precision_params`"
        )
    if why is not None:
        return why
    # True: a weight [K, N] was quantised, which the owner warns of
    turned = state.shape[0] != module.out_features
    if turned and repacked:
        return "bitsandbytes has repacked a weight [K, N] for this processor"
    kind = Repacked4 if repacked else Bnb4
    found = kind(weight, bits.contiguous(), state, module, turned)
    return Found(found, held.get("bias"))


def _plain(weight: Any) -> Tensor:
    detached: Tensor = DisabledTorchFunction(Tensor.detach, (Tensor,), (weight,), {})
    return detached


def _mismatch(module: Any, bits: Tensor, state: Any) -> str | None:
    """The reason that weight, statistics and layer do not belong together; None when they do."""
    kind, blocksize, shape, absmax = state.quant_type, state.blocksize, state.shape, state.absmax
    if kind not in _KINDS:
        return f"its 4-bit format is {kind!r}; known: {', '.join(_KINDS)}"
    if absmax is None:
        return Unusable("its 4-bit weight has no scales")
    if absmax.is_meta:
        return Unusable("the statistics of its 4-bit weight are on the meta device")
    N, K = module.out_features, module.in_features
    if shape != (N, K) and shape != (K, N):
        return Unusable(
            f"its 4-bit weight is of shape {tuple(shape)}, and the layer of {(N, K)} (out, in)"
        )
    count = N * K
    held = bits.numel() * bits.element_size()
    if held != (count + 1) // 2:
        return Unusable(
            f"its 4-bit weight of shape {tuple(shape)} is {held} bytes; {(count + 1) // 2} belong "
            "to it (is it a part, or not quantised yet?)"
        )
    if absmax.numel() != -(-count // blocksize):
        return Unusable(
            f"its 4-bit weight of shape {tuple(shape)} has {absmax.numel()} scales; for blocks of "
            f"{blocksize} it needs {-(-count // blocksize)}: it was packed for another blocksize"
        )
    return _mismatch_of_nested(state, bits.device) if state.nested else None


def _mismatch_of_nested(state: Any, device: torch.device) -> str | None:
    """The same for nested statistics; the owner's operators read past those that are too short."""
    inner, offset, count = state.state2, state.offset, state.absmax.numel()
    held = None if inner is None else (inner.absmax, inner.code, offset)
    if held is None or any(t is None for t in held):
        return Unusable("its 4-bit weight has nested statistics, of which a part is missing")
    if any(t.device != device for t in held):
        devices = ", ".join(str(t.device) for t in held)
        return Unusable(
            f"its 4-bit weight is on {device}, and its nested statistics are on {devices}"
        )
    scales, needed = inner.absmax.numel(), -(-count // inner.blocksize)
    if scales != needed or inner.code.numel() != 256:
        return Unusable(
            f"its 4-bit weight has {count} nested scales, for which {scales} scales in blocks of "
            f"{inner.blocksize} and a table of {inner.code.numel()} numbers are here; {needed} and "
            "256 belong to them"
        )
    return None


def repacked(module: Any, weight: Tensor) -> State:
    """What a ``Linear4bit`` holds for another weight [N, K], with the settings of the present one.

    The owner's ``Params4bit`` quantises when it is moved to its device.
    """
    old = module.weight
    state = old.__dict__.get("quant_state") or module.quant_state
    sorted_anew = getattr(state, "packing_format_for_cpu", False)
    dtype, nested = state.dtype, state.nested
    if sorted_anew:
        dtype, nested = state.original_dtype, state.original_nested
    made = type(old)(
        (weight if state.shape == weight.shape else weight.t()).to(dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=nested,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
    ).to(old.device)
    made.module = old.module  # not before: it would be given the new statistics at once
    return State({"weight": made, "quant_state": made.quant_state})
