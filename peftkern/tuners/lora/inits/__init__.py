"""The initialisations of A and B other than plain random numbers.

Each method is one function from the base weight to A and B. A method whose start would change the
model's outputs also subtracts scaling · B A from the base weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....configs.lora import LoraConfig
from ....ops.bases import repack
from ....ops.bases.formats import is_packed, numbers
from ....utils.gathering import is_shard
from ....utils.zero3 import whole_shape
from ..corda import check_eigens, corda
from ..loraga import GRADIENT, lora_ga
from ..variant import register, variants_asked
from .decomposed import mica, olora, orthogonal, pissa
from .loftq import check_settings, loftq
from .residual import (
    HALF_OR_SINGLE,
    PackedWeight,
    Start,
    collect,
    note,
    same_on_ranks,
    stored,
    weight_of,
)

__all__ = ["check", "collect", "drawn_as", "start"]

# {name: function of (layer, adapter, config) that returns a Start, or None for the plain start}
METHODS: dict[str, Callable[[Any, str, LoraConfig], Start | None]] = {
    "pissa": pissa,
    "olora": olora,
    "orthogonal": orthogonal,
    "loftq": loftq,
    "corda": corda,
    "lora_ga": lora_ga,
    "mica": mica,
}
# a variant in HF PEFT, which cannot be combined with others; its layers compute as plain LoRA's
register("mica", ("linear", "embedding"), None)
# values for which a linear layer draws its own start: A at random and B zero
PLAIN = ("gaussian", "eva")
WRONG_DTYPE = {
    "pissa": "Please initialize PiSSA under float32, float16, or bfloat16. Subsequently, "
    "re-quantize the residual model to help minimize quantization errors.",
    "corda": "Please initialize CorDA under float32, float16, or bfloat16. Subsequently, "
    "re-quantize the residual model to help minimize quantization errors.",
    "olora": "Unsupported data type for the base layer. Got {dtype}.",
    "mica": "Please initialize MiCA under float32, float16, or bfloat16.",
}


def method_of(config: LoraConfig) -> str | None:
    """The key in METHODS of a configuration's initialisation; None for a plain one.

    Raises:
        ValueError: no initialisation has that name.
    """
    init: Any = config.init_name
    if not isinstance(init, str) or init in PLAIN:
        return None
    if init.startswith("pissa"):
        head, _, steps = init.partition("_niter_")
        if init != "pissa" and (head != "pissa" or not steps.isdecimal()):
            raise ValueError(
                "init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got "
                f"{init} instead."
            )
        return "pissa"
    if init not in METHODS:
        raise ValueError(f"Unknown initialization init_lora_weights={config.init_lora_weights!r}")
    return init


def drawn_as(layer: Any, config: LoraConfig) -> bool | str:
    """The start that is drawn before :func:`start`: ``init_name``, or True (a plain start).

    True is for LoRA-GA without a gradient.
    """
    name = config.init_name
    if name == "lora_ga" and not hasattr(layer.get_base_layer(), GRADIENT):
        return True
    return name


def check(key: str, base: Any, r: int, config: LoraConfig) -> None:
    """Refuse a layer ``base``, named ``key``, that :func:`start` cannot handle; changes nothing.

    Raises:
        TypeError: the base weight's dtype is not float32, float16 or bfloat16 where it must be.
        ValueError: an odd rank, a missing preprocessing, a weight on the meta device, or a layer
            for which the method does not work.
    """
    name = method_of(config)
    if name is None or isinstance(base, torch.nn.Embedding) and name not in ("loftq", "mica"):
        return  # in HF PEFT an embedding then gets the plain start
    if isinstance(base, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and name == "lora_ga":
        return  # and so does a convolution
    packed = is_packed(base)
    if not (isinstance(base, torch.nn.Linear) or hasattr(base, "nf") or packed or name == "mica"):
        raise ValueError(
            f"Unknown initialization init_lora_weights={config.init_lora_weights!r} for the "
            f"{type(base).__name__} `{key}`; it is for linear layers"
        )
    if name == "orthogonal":
        if r % 2:
            raise ValueError(
                f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead."
            )
        return
    if packed:
        _check_quantised(key, base, r, str(name))
        return
    weight = base.weight
    shape = whole_shape(weight)
    if name in WRONG_DTYPE and weight.dtype not in HALF_OR_SINGLE:
        raise TypeError(WRONG_DTYPE[name].format(dtype=weight.dtype))
    if name == "loftq" and not weight.is_floating_point():
        raise TypeError(
            f"LoftQ quantises the weight of `{key}` itself, and that is {weight.dtype} already; "
            "for a model in 4 bits see `replace_lora_weights_loftq`"
        )
    if name == "lora_ga" and not hasattr(base, GRADIENT):
        return  # without a gradient, as when an adapter is loaded, the start is plain
    if weight.is_meta:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} computes with the weight of `{key}`, "
            "which is on the meta device"
        )
    if name == "mica":
        _check_rank_of_mica(key, base, r, shape)
    if "_niter_" in str(config.init_name) and r > min(shape):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} finds at most {min(shape)} "
            f"singular values of `{key}`, and the rank is {r}"
        )
    if name in ("olora", "loftq") and hasattr(base, "nf"):
        raise ValueError(
            f"init_lora_weights='{name}' is not for the Conv1D `{key}`: HF PEFT takes its weight "
            "as it is stored, [in, out], so that A and B do not fit; use 'pissa'"
        )
    if name == "corda":
        check_eigens(base, r)
    if name == "loftq":
        check_settings(config)


def _check_rank_of_mica(key: str, base: Any, r: int, shape: Sequence[int]) -> None:
    if r > min(shape):
        sizes = (
            "num_embeddings, embedding_dim"
            if isinstance(base, torch.nn.Embedding)
            else "in_features, out_features"
        )
        raise ValueError(
            f"MiCA requires `r` <= min({sizes}) but got r={r} for `{key}`, a layer with weight "
            f"shape {tuple(shape)} (max usable r is {min(shape)})."
        )


def _check_quantised(key: str, base: Any, r: int, name: str) -> None:
    """:func:`check` for a base layer with a quantised weight.

    MiCA reads the weight alone, and quanto's and torchao's count as floating point.

    Raises:
        TypeError: the method needs a floating-point weight, or changes one that its owner cannot
            quantise again.
        ValueError: the rank of MiCA is too large.
    """
    found = numbers(base)
    owner = type(base._parameters.get("weight")).__module__.partition(".")[0]
    if name == "mica" and owner in ("optimum", "torchao") and not isinstance(found, str):
        _check_rank_of_mica(key, base, r, found.packed.shape)
        return
    kind = f"a {type(base).__name__}" if isinstance(found, str) else found.packed.format
    if name == "loftq":
        raise TypeError(
            f"LoftQ quantises the weight of `{key}` itself, and that is {kind} already; "
            "for a model in 4 bits see `replace_lora_weights_loftq`"
        )
    if name in WRONG_DTYPE and name != "olora":
        raise TypeError(WRONG_DTYPE[name].format(dtype=kind) + f" `{key}` is {kind}.")
    if name == "olora" and (reason := repack.why_not(base)) is not None:
        raise TypeError(f"{WRONG_DTYPE[name].format(dtype=kind)} `{key}`: {reason}")


@torch.no_grad()
def start(layer: Any, adapter: str, config: LoraConfig) -> None:
    """Give ``lora_A`` [r, K] and ``lora_B`` [N, r] of a linear layer their first values.

    If the method says so, their product is subtracted from the base weight (at the end of the
    injection, see :mod:`.residual`). The values are rounded to the base weight's dtype, as in HF
    PEFT, and kept in the adapter's dtype.
    """
    name = method_of(config)
    if name is None:
        return
    base = layer.get_base_layer()
    check(adapter, base, layer.r[adapter], config)
    found = METHODS[name](layer, adapter, config)
    if found is None:
        return
    place = weight_of(base)
    if is_shard(place):
        found = same_on_ranks(found, place)
    dtype = torch.float32 if isinstance(place, PackedWeight) else stored(place.dtype)
    if isinstance(base, torch.nn.Embedding):
        stores = (layer.lora_embedding_A, layer.lora_embedding_B)
        for parameters, value in zip(stores, (found.A, found.B), strict=True):
            parameters[adapter].copy_(value.to(dtype))
        return
    for store, value in ((layer.lora_A, found.A), (layer.lora_B, found.B)):
        linear: Any = store[adapter]
        if linear.weight.shape != value.shape:  # W has fewer than r singular values
            new = linear.weight.detach().new_empty(value.shape)
            linear.weight = torch.nn.Parameter(new, requires_grad=linear.weight.requires_grad)
            linear.out_features, linear.in_features = value.shape
        if not linear.weight.is_meta:  # on the meta device a checkpoint brings the values
            linear.weight.copy_(value.to(dtype))
    # at once if a variant reads the base weight after this
    measured = any(variant.measures_weight for variant in variants_asked(config))
    note(place, found, at_once=measured)
