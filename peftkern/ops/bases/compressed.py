"""Linear layers of compressed-tensors: float8, int8, packed integers and FP4, or decompressed.

The owner leaves the class ``nn.Linear``, gives a layer a ``quantization_scheme`` and replaces its
``forward``. A model is loaded compressed, and a hook (``model.ct_decompress_hook``) decompresses
all of it before its first forward; both states are read.

Where the scheme quantises X as well (W8A8), so does the product here, by the owner's own function:
Y = Q(X) Wᵀ. The gradient goes straight through, dX = dY W. The owner gives X none, so that in HF
PEFT no gradient passes such a layer but through adapters; it is the one difference.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.private import compressed_forward
from .compressed_numbers import PackedFloat4, PackedInt, unpacked
from .compressed_packing import packed_anew
from .formats import Found, Unusable
from .fp8 import Fp8, chosen
from .fp8_numbers import cast_error, shape_error
from .repack import State
from .weight import Packed


class Decompressed(Packed):
    """A weight that its owner has made dense again."""

    __slots__ = ("weight", "shape", "device", "format")
    holds_dense = True

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight, (weight.shape[0], weight.shape[1])
        self.device, self.format = weight.device, "decompressed (compressed-tensors)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.weight,)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)


class QuantisedInput(Packed):
    """A weight whose products quantise X first, as the owner's forward does."""

    __slots__ = ("inner", "module", "arguments", "shape", "device")
    quantises_input = True
    is_linear = False

    def __init__(self, inner: Packed, module: Any, arguments: Any) -> None:
        self.inner, self.module, self.arguments = inner, module, arguments
        self.shape, self.device = inner.shape, inner.device

    @property
    def holds_dense(self) -> bool:  # type: ignore[override]
        return self.inner.holds_dense

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.inner.tensors

    @property
    def format(self) -> str:  # type: ignore[override]
        a = self.arguments
        if self.inner.quantises_input:
            return self.inner.format
        return f"{self.inner.format}, X in {a.type} {a.num_bits} bits a {a.strategy}"

    def why_not_takes(self, x: Tensor) -> str | None:
        if self.arguments.strategy == "token" and x.dim() != 3:
            return f"its owner takes scales of an X of {x.dim()} dimensions in another way"
        return None

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.inner.dense(dtype)

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        if self.inner.quantises_input:  # which quantises X itself
            return self.inner.product(x, y)
        owner: Any = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
        # its scales of tokens are those of the first two of three dimensions
        q = owner.forward_quantize(self.module, x.unsqueeze(0), "input", self.arguments)
        return self.inner.product(q.squeeze(0).to(x.dtype), y)

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        return self.inner.grad_input(dy, dx)


def is_owners_forward(module: nn.Module) -> bool:
    """True when the forward that a module has for itself computes what reading it computes.

    That is the owner's forward of a linear layer, or any module's forward in the wrapper that the
    owner puts around every module of a model which it decompresses. The wrapper moves inputs to
    the device of the weights.
    """
    function: Any = getattr(module.__dict__.get("forward"), "__func__", None)
    if _home(function) == "compressed_tensors.offload.module":
        own = compressed_forward(module)
        if own is None or _moves(module):
            return False
        function = own
        if function is type(module).forward:
            return True
    return (
        getattr(function, "__wrapped__", None) is nn.Linear.forward
        and _home(function) == "compressed_tensors.quantization.lifecycle.forward"
        and "quantization_scheme" in module.__dict__
    )


def _home(function: Any) -> str:
    """The module that a function was written in; ``wraps`` does not change it."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _moves(module: Any) -> bool:
    """True when the owner keeps the module's tensors on another device than it computes on."""
    cache = module._parameters
    held = getattr(cache, "offloaded_values", {}).values()
    target = getattr(cache, "onload_device", None)
    return target is not None and any(
        t is not None and t.device.type != torch.device(target).type for t in held
    )


def read(module: Any) -> Found | str:
    """The weight of a layer with a ``quantization_scheme``, or the reason that it can't be read."""
    if type(module).forward is not nn.Linear.forward or not is_owners_forward(module):
        if _home(getattr(module.__dict__.get("forward"), "__func__", None)).endswith(
            "offload.module"
        ):
            return "compressed-tensors keeps its weight on another device"
        return f"a {type(module).__name__} computes its product in its own way"
    state = module.__dict__
    scheme, status = state["quantization_scheme"], state.get("quantization_status")
    stage = str(getattr(status, "value", status))
    if not state.get("quantization_enabled", True):
        return "its quantisation is switched off"
    if stage not in ("compressed", "decompressed"):
        return f"its owner quantises the weight in every call ({stage})"
    if scheme.output_activations is not None:
        return "its owner quantises Y"
    held = {**module._parameters, **module._buffers}
    if any(t is not None and t.is_meta for t in held.values()):
        return "its weight is on the meta device (offloaded or not loaded yet)"
    inner = Decompressed(held["weight"]) if stage == "decompressed" else _packed(module, held)
    if isinstance(inner, str):
        return inner
    if (arguments := scheme.input_activations) is None:
        return Found(inner, module._parameters.get("bias"))
    if inner.device.type != "cpu":
        # the Triton kernels read dense numbers and know nothing of a quantised X
        return f"its owner quantises X, which operations on {inner.device.type} do not"
    return Found(QuantisedInput(inner, module, arguments), module._parameters.get("bias"))


def _packed(module: Any, held: dict[str, Any]) -> Packed | str:
    a = module.__dict__["quantization_scheme"].weights
    if a is None:
        return Decompressed(held["weight"])
    if held.get("weight_g_idx") is not None:
        return "its columns are in act-order (g_idx), which compressed-tensors no longer reads"
    scale, zero = held.get("weight_scale"), held.get("weight_zero_point")
    if scale is None:
        return "its weight has no scales"
    block: tuple[int, int] | None = None
    if a.strategy == "block":
        block = (a.block_structure[0], a.block_structure[1])
    elif a.strategy in ("group", "tensor_group"):
        block = (1, a.group_size)
    elif a.strategy not in ("tensor", "channel"):
        return f"its scales are of strategy {a.strategy}"
    words = {"tensor": "one scale", "channel": "a scale a row"}.get(a.strategy)
    if words is None and block is not None:
        words = f"blocks of {block[0]} x {block[1]}"
    kind = f"{a.type} {a.num_bits} bits, {words} (compressed-tensors)"
    if (weight := held.get("weight")) is not None:
        if (wrong := shape_error(weight, scale, block)) is not None:
            return wrong
        if weight.is_floating_point() and weight.dtype.itemsize == 1 and zero is None:
            return Fp8(weight, scale, block, kind, compute=chosen(module), kept=scale.dtype)
        if weight.dtype == torch.int8:
            return PackedInt(
                weight, None, (weight.shape[0], weight.shape[1]), scale, zero, block, kind
            )
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            return Unusable(cast_error(weight))
        return f"its weight is {weight.dtype}"
    bits = held.get("weight_packed")
    if bits is None:
        return "it has neither `weight` nor `weight_packed`"
    if bits.dtype == torch.uint8 and a.num_bits == 4 and a.type == "float" and block is not None:
        return PackedFloat4(bits, scale, held.get("weight_global_scale"), block[1], kind)
    if bits.dtype != torch.int32 or a.type != "int":
        return f"its weight is {a.type} of {a.num_bits} bits packed in {bits.dtype}"
    if a.num_bits not in (4, 8):
        return f"its weight is packed in {a.num_bits} bits; 4 and 8 are read"
    N = bits.shape[0]
    # `weight_shape` is a tensor: on a GPU reading it would wait for the device
    K = scale.shape[1] * block[1] if block is not None else int(held["weight_shape"][1])
    if zero is not None:
        zero = unpacked(zero.t(), a.num_bits, N).t()
    return PackedInt(bits, a.num_bits, (N, K), scale, zero, block, kind)


def repacked(module: Any, weight: Tensor) -> State:
    """What a compressed layer holds for another weight [N, K]: see :mod:`.compressed_packing`."""
    status = module.__dict__["quantization_status"]
    return State({**packed_anew(module, weight), "quantization_status": status})
