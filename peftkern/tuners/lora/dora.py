"""DoRA (Liu et al., 2024, arXiv 2402.09353): a magnitude for each output beside A and B.

    W' = m / ‖W + s B A‖ · (W + s B A)         norm over all dimensions but the outputs'

``lora_magnitude_vector[name].weight`` holds m. It starts as the norm, so that the output does not
change at first, and trains with A and B. The norm follows A and B but counts as a constant in the
gradient (section 4.3). :mod:`.dora_parameter` has DoRA on parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...ops import autocast
from ...ops.backend import describe
from ...ops.bases.formats import read, reader_of
from ...ops.bases.weight import BaseWeight, dense
from ...ops.dora import dora_linear
from ...ops.dora_norm import gain, row_norms
from ...ops.tracing import is_compiling, is_tracing
from ...utils.gathering import held_in, is_whole
from ...utils.private import convolve
from ...utils.shards import frozen
from .plan import calls_more, has_whole_weight
from .variant import LoraVariant

# True: layers in eval mode keep their norms from one call to the next; see DoraCaching
ENABLE_DORA_CACHING = False

MIXED = "Cannot pass `adapter_names` when DoRA is enabled."


class DoraCaching:
    """Keep the norms of DoRA layers between calls: as a context manager, or permanently by a call.

    In eval mode a layer then computes ‖W + s B A‖ once and not in every call. It computes the norm
    again after ``train()``, in calls outside of the block, and when the scale or torch's version
    number of a weight has changed. A write through ``.data`` does not change that number and is not
    noticed. DoRA on parameters keeps the norms of linear layers' weights only.

    Args:
        enabled: False switches caching off within the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.before: bool | None = None

    def __enter__(self) -> None:
        global ENABLE_DORA_CACHING
        self.before, ENABLE_DORA_CACHING = ENABLE_DORA_CACHING, self.enabled

    def __exit__(self, *error: Any) -> None:
        global ENABLE_DORA_CACHING
        ENABLE_DORA_CACHING, self.before = bool(self.before), None

    def __call__(self, enabled: bool = True) -> None:
        global ENABLE_DORA_CACHING
        ENABLE_DORA_CACHING = enabled


class DoraLayer(nn.Module):
    """The magnitude m of one adapter in one layer.

    ``weight`` is [N]; for a convolution with d spatial dimensions [1, N, 1, …], d + 2 dimensions;
    for a parameter of E experts [E, N].
    """

    def __init__(self, magnitude: Tensor, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude, requires_grad=trainable)
        self._dora_cache: dict[str, Any] = {}

    def forward(self) -> Tensor:
        """The magnitude, as a copy: what gathers the weight for a call frees it after."""
        return self.weight.clone()

    def train(self, mode: bool = True) -> DoraLayer:
        if mode:
            self._dora_cache.clear()
        return super().train(mode)

    def norms(self, compute: Callable[[], Tensor], sources: tuple[Any, ...]) -> Tensor:
        """The norms [N]: those kept, if ``sources`` have not changed, or else computed."""
        if not ENABLE_DORA_CACHING or self.training or is_tracing():  # a trace records the norm
            if self._dora_cache:
                self._dora_cache.clear()
            return compute()
        state = tuple(_state(source) for source in sources)
        known, norms = self._dora_cache.get("norms", (None, None))
        # autograd refuses tensors that were made in inference mode
        usable = norms is not None and (
            not norms.is_inference() or torch.is_inference_mode_enabled()
        )
        if known != state or not usable:
            norms = compute()
            self._dora_cache["norms"] = state, norms  # one assignment, as threads share the layer
        return norms

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


def magnitude_of(layer: Any, adapter: str) -> Tensor:
    """The magnitude of an adapter: its parameter, or what a call gives where that is a shard."""
    dora: Any = layer.lora_magnitude_vector[adapter]
    found: Tensor = dora.weight if is_whole(dora) else dora()
    return found


def _state(source: Any) -> Any:
    if not isinstance(source, Tensor):
        return source
    if isinstance(source, BaseWeight):  # made for each call, of its owner's tensors
        return (*map(_state, source.packed.tensors),)
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.device


class DoraVariant(LoraVariant):
    """The part of DoRA that all kinds of layers share; a subclass says where W, A and B are."""

    name = "DoRA"
    measures_weight = True
    refusals = {
        "attention": "MultiheadAttention does not support DoRA (yet), please set use_dora to False",
    }

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        weight, A, B = self.weights(layer, adapter)
        if A.is_meta or weight.is_meta:
            norms = torch.empty(self.norms_shape(layer, weight), device="meta")
        else:
            norms = self.computed_norms(weight, A, B, layer.scaling[adapter], layer)
        magnitude = norms.to(A.dtype).view(self.magnitude_shape(layer))
        dora = DoraLayer(magnitude, trainable)
        dora.training = layer.training
        layer.lora_magnitude_vector[adapter] = dora

    def weights(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """(base weight as it is stored, A, B)."""
        base = layer.get_base_layer()
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return known_weight(base), A, B

    def outputs_dim(self, layer: Any) -> int:
        """The dimension of the stored base weight that counts the outputs."""
        return 1 if layer.fan_in_fan_out else 0

    def norms_shape(self, layer: Any, weight: Tensor) -> tuple[int, ...]:
        """The shape of what :meth:`computed_norms` gives: [N], of several experts [E, N]."""
        return (weight.shape[self.outputs_dim(layer)],)

    def magnitude_shape(self, layer: Any) -> tuple[int, ...]:
        return (-1,)

    def computed_norms(
        self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any
    ) -> Tensor:
        """The norms of weight + scale · B A, at least float32, detached."""
        return row_norms(weight, A, B, scale, transposed=self.outputs_dim(layer) == 1)

    def updated(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any) -> Tensor:
        """weight + scale · B A in the weight's shape and dtype, which is at least float32."""
        A, B = A.to(weight.dtype), B.to(weight.dtype)
        if self.outputs_dim(layer) == 1:
            return torch.addmm(weight, A.t(), B.t(), alpha=scale)
        return torch.addmm(weight, B, A, alpha=scale)

    def over(self, layer: Any, factor: Tensor, weight: Tensor) -> Tensor:
        """A factor for each output, in a shape that multiplies the stored weight."""
        shape = [1] * weight.dim()
        shape[self.outputs_dim(layer)] = -1
        return factor.view(shape)

    def norms(self, layer: Any, adapter: str) -> Tensor:
        """The norms of the layer, from its present weights or from the cache."""
        scale = layer.scaling[adapter]
        weight, A, B = self.weights(layer, adapter)
        if weight.is_meta and not A.is_meta:
            raise RuntimeError(
                f"DoRA needs the weight of its {type(layer.get_base_layer()).__name__} in every "
                "call, and that is on the meta device (offloaded?)"
            )
        dora: DoraLayer = layer.lora_magnitude_vector[adapter]
        return dora.norms(
            lambda: self.computed_norms(weight, A, B, scale, layer), (weight, A, B, scale)
        )

    def gain(self, layer: Any, adapter: str) -> Tensor:
        """m / norm, in the norms' shape, with a gradient to m alone."""
        norms = self.norms(layer, adapter)
        return gain(self.magnitude(layer, adapter).view(norms.shape), norms)

    def magnitude(self, layer: Any, adapter: str) -> Tensor:
        """The adapter's m, with its graph."""
        return magnitude_of(layer, adapter)

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        _, A, B = self.weights(layer, adapter)
        A, B = A.to(weight.device), B.to(weight.device)
        norms = self.computed_norms(base, A, B, layer.scaling[adapter], layer)
        magnitude = self.magnitude(layer, adapter).view(norms.shape)
        factor = self.over(layer, gain(magnitude.to(norms), norms), weight)
        return factor * self.updated(weight, A, B, layer.scaling[adapter], layer)

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        low = layer.lora_A[adapter].weight.dtype
        base, drop = layer.get_base_layer(), layer.lora_dropout[adapter]
        if not autocast.is_on(x):
            x = x.to(low)
        view = (-1,) + (1,) * (self.spatial_dims(layer))
        g = self.gain(layer, adapter)
        if isinstance(drop, nn.Identity) or not layer.training:
            bias = getattr(base, "bias", None)
            product = result if bias is None else result - frozen(bias).view(view)
        else:
            x = drop(x)
            product = self.product(layer, base, x)
        low = torch.promote_types(result.dtype, low)
        # 1 is subtracted before rounding to a narrow dtype: afterwards few digits would be left
        more, factor = ((f.view(view).to(low)) for f in (g - 1, g * layer.scaling[adapter]))
        return result + more * product + factor * self.low_rank(layer, adapter, x)

    def spatial_dims(self, layer: Any) -> int:
        """The number of an output's dimensions after the one that counts the outputs."""
        return 0

    def low_rank(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """B A x, without the scaling."""
        update: Tensor = layer.lora_B[adapter](layer.lora_A[adapter](x))
        return update

    def product(self, layer: Any, base: Any, x: Tensor) -> Tensor:
        """The base layer's product with ``x``, without its bias."""
        weight = dense(known_weight(base).to(x.dtype))
        return linear(x, weight.t() if layer.fan_in_fan_out else weight)

    def refuses_mixed(self) -> str | None:
        return MIXED


class DoraLinearVariant(DoraVariant, setting="use_dora", layers=("linear",)):
    """DoRA on ``nn.Linear`` and transformers' ``Conv1D``; runs as one operation where possible."""

    def norms(self, layer: Any, adapter: str) -> Tensor:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if all(
            type(m) is nn.Linear
            and has_whole_weight(m)
            and held_in(m, "bias") is None
            and not calls_more(m)
            for m in (A, B)
        ):
            return super().norms(layer, adapter)
        # A or B is sharded, wrapped or hooked: only a call shows what it computes
        weight = dense(known_weight(layer.get_base_layer()))
        weight = weight.t() if layer.fan_in_fan_out else weight
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, torch.float32)
            dtype = layer.lora_magnitude_vector[adapter].weight.dtype
            eye = torch.eye(weight.shape[1], device=weight.device, dtype=dtype)
            update = B(A(eye)).t().to(wide)
            whole = weight.to(wide) + update * layer.scaling[adapter]
            return torch.linalg.vector_norm(whole, dim=1).detach()

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = layer.product_call(x, adapter)
        if call is None or _quantises_input(layer.base_layer):
            return None
        p = call.p if layer.training else 0.0
        magnitude = magnitude_of(layer, adapter)
        norms = self.norms(layer, adapter)
        weight, bias, A, B = call.tensors
        return dora_linear(x, weight, bias, A, B, magnitude, call.scale, p, call.transposed, norms)

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        if layer.product_reason(adapter) is not None or _quantises_input(layer.base_layer):
            return None
        return operation(layer, adapter)

    def decline(self, layer: Any, adapter: str) -> str:
        reason = layer.product_reason(adapter)
        if reason is None and _quantises_input(layer.base_layer):
            reason = "its base layer quantises X, and what DoRA scales is a product of X itself"
        return "DoRA has an operation of its own" if reason is None else f"DoRA; {reason}"


def operation(layer: Any, adapter: str) -> str:
    """What ``explain`` calls the one operation of DoRA on a linear layer."""
    drop = layer.lora_dropout[adapter]
    drops = isinstance(drop, nn.Dropout) and layer.training and drop.training
    if drops and describe()[0] != "torch":
        return "DoRA: one operation; with dropout, its products are torch's"
    return "DoRA: one operation"


class DoraEmbeddingVariant(DoraVariant, setting="use_dora", layers=("embedding",)):
    """DoRA on ``nn.Embedding``: a norm for each of its dimensions, over the vocabulary."""

    def weights(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return known_weight(layer.get_base_layer()), A, B

    def outputs_dim(self, layer: Any) -> int:
        return 1

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        return self.gain(layer, adapter) * (result + layer._update(adapter, x, result))


class DoraConvVariant(DoraVariant):
    """DoRA on convolutions of any dimension: a norm for each output channel."""

    def magnitude_shape(self, layer: Any) -> tuple[int, ...]:
        return (1, -1) + (1,) * self.spatial_dims(layer)

    def outputs_dim(self, layer: Any) -> int:
        return 0

    def computed_norms(
        self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any
    ) -> Tensor:
        with torch.no_grad():
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            whole = self.updated(weight.to(wide), A, B, scale, layer)
            # detach() too, as torch.jit.trace does not record no_grad()
            return torch.linalg.vector_norm(whole.flatten(1), dim=1).detach()

    def updated(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, layer: Any) -> Tensor:
        # with groups HF PEFT reshapes the product to the weight's shape and ignores the groups; the
        # magnitudes of its checkpoints were trained with this norm
        r = A.shape[0]
        update = B.to(weight.dtype).reshape(-1, r) @ A.to(weight.dtype).reshape(r, -1)
        return weight + scale * update.view(weight.shape)

    def spatial_dims(self, layer: Any) -> int:
        return layer.get_base_layer().weight.dim() - 2

    def product(self, layer: Any, base: Any, x: Tensor) -> Tensor:
        return convolve(base, x, base.weight.to(x.dtype))


class DoraConv1dVariant(DoraConvVariant, setting="use_dora", layers=("conv1d",)):
    """DoRA on ``nn.Conv1d``."""


class DoraConv2dVariant(DoraConvVariant, setting="use_dora", layers=("conv2d",)):
    """DoRA on ``nn.Conv2d``."""


class DoraConv3dVariant(DoraConvVariant, setting="use_dora", layers=("conv3d",)):
    """DoRA on ``nn.Conv3d``."""


def _quantises_input(base: Any) -> bool:
    found = None if reader_of(base) is None else read(base)
    return found is not None and not isinstance(found, str) and found.packed.quantises_input


@torch.compiler.disable
def _numbers(base: Any) -> Tensor:
    """:func:`known_weight` outside the graph: compilers do not trace how owners keep weights."""
    return dense(known_weight(base))


def known_weight(base: Any) -> Tensor:
    """A layer's weight as floating-point numbers: its own tensor, or one read in its format.

    Of a DTensor, the whole without its gradient.

    Raises:
        TypeError: the weight is quantised in a way that cannot be read here.
    """
    why = ""
    if reader_of(base) is not None:
        if is_compiling():
            return _numbers(base)
        found = read(base)
        if not isinstance(found, str):
            double = any(t.dtype == torch.float64 for t in found.packed.tensors)
            # norms are computed in float32 at least
            return BaseWeight(found.packed, torch.float64 if double else torch.float32)
        why = f" ({found})"
    if hasattr(base, "W_q"):  # HQQ keeps its weight in buffers of its own
        return base.dequantize()
    weight: Any = getattr(base, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if plain and type(weight) in (nn.Parameter, Tensor):
        return weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if not plain:
        kind = type(weight).__name__
        what = f"{kind} of {weight.dtype}" if isinstance(weight, Tensor) else kind
        raise TypeError(
            f"DoRA needs the weight of a {type(base).__name__} as numbers, and that is a "
            f"{what}{why}; allowed: floating point, or a quantised format that is read"
        )
    return frozen(weight)
