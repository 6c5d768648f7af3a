"""Weights of HQQ (Badri & Shaji, 2023): ``HQQLinear`` with 8, 4, 3, 2 or 1 bit, any grouping.

    W = (codes - zero) · scale, reshaped to [N, K]

The codes stand in rows of groups (``axis`` 1: [N K / group, group]) or in columns (``axis`` 0). A
packed word holds codes of rows that are far apart: the first part of the rows in its high bits.
Scales and zeros may be quantised in the same way (older releases), or lie on the CPU in one tensor
(``offload_meta``).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .formats import Found, OwnProduct
from .repack import State
from .weight import Packed

# packing -> (bits of a code, codes in a word)
_PACKINGS = {
    "8bit_u8": (8, 1),
    "4bit_u8": (4, 2),
    "3bit_32": (3, 10),
    "2bit_u8": (2, 4),
    "1bit_u8": (1, 8),
}

# names in the meta: as numbers, as codes, whether it is codes, and the codes' own meta
_STATISTICS = (
    ("zero", "zero_q", "quant_zero", "meta_zero"),
    ("scale", "scale_q", "quant_scale", "meta_scale"),
)


class Hqq(Packed):
    """A weight of an ``HQQLinear``: its words and its ``meta``."""

    __slots__ = ("words", "meta", "shape", "device", "format")

    def __init__(self, words: Tensor, meta: dict[str, Any]) -> None:
        N, K = meta["shape"]
        self.words, self.meta = words, meta
        self.shape, self.device = (N, K), words.device
        self.format = f"{meta['nbits']} bit (HQQ)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.words, *(v for v in self.meta.values() if isinstance(v, Tensor))

    def dense(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            zero, scale = self._statistics()
            return _dense(self.words, self.meta, zero, scale).to(dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(zero, scale), dequantised and on the words' device."""
        meta, found = self.meta, []
        both = meta.get("zero_scale")
        for i, (name, quantised, flag, inner) in enumerate(_STATISTICS):
            held: Any = meta.get(quantised, meta.get(name)) if both is None else both[i]
            held = held.to(self.device)
            if meta.get(flag):
                own = meta[inner]
                held = _dense(held, own, own["zero"], own["scale"])
            found.append(held)
        return found[0], found[1]


def _dense(words: Tensor, meta: dict[str, Any], zero: Tensor, scale: Tensor) -> Tensor:
    codes = _codes(words, meta)
    if codes.dtype == zero.dtype == scale.dtype:
        dense = codes.sub_(zero).mul_(scale)
    else:
        dense = (codes - zero) * scale
    return dense.reshape(tuple(meta["shape"]))


def _codes(words: Tensor, meta: dict[str, Any]) -> Tensor:
    """The codes in the dtype that their owner computes with."""
    dtype, packing = meta.get("compute_dtype", torch.float16), meta["packing"]
    if packing is None:
        return words.to(dtype, copy=True)
    if meta.get("view_as_float"):
        words = words.view(meta["unpack_view_dtype"])
    bits, count = _PACKINGS[packing]
    if count == 1:
        return words.to(dtype)
    codes = torch.empty((count, *words.shape), dtype=dtype, device=words.device)
    for i, part in enumerate(codes):
        part.copy_((words >> bits * (count - 1 - i)).bitwise_and_(2**bits - 1))
    codes = codes.flatten(0, 1)
    if bits == 3:  # ten codes in a word: the last word may not be full
        N, K = meta["shape"]
        codes = codes[: meta["group_size"] if meta["axis"] == 0 else N * K // meta["group_size"]]
    return codes


def read(module: Any) -> Found | str:
    """The weight of an ``HQQLinear``, or the reason that it cannot be read."""
    words, meta = module.W_q, module.meta
    if words is None or meta is None or not module.ready:
        return "it has no weight yet: HQQ quantises or loads it later"
    if words.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if len(meta["shape"]) != 2:
        return f"its weight is of shape {tuple(meta['shape'])}"
    for part in (meta, meta.get("meta_zero", meta), meta.get("meta_scale", meta)):
        if part["packing"] is not None and part["packing"] not in _PACKINGS:
            return f"HQQ packed its weight as {part['packing']!r}, of unknown format"
    if "zero_scale" not in meta:
        for name, quantised, *_ in _STATISTICS:
            if quantised not in meta and name not in meta:
                return f"the weight has no {name}s: its statistics are missing"
    # they may wait on the CPU (offload_meta), but not be absent
    for part in (meta, meta.get("meta_zero") or {}, meta.get("meta_scale") or {}):
        if any(isinstance(v, Tensor) and v.is_meta for v in part.values()):
            return "its statistics are on the meta device (offloaded or not loaded yet)"
    if (wrong := _shape_error(meta)) is not None:
        return wrong
    found = Found(Hqq(words, meta), module.bias)
    if "int8" in getattr(type(module).forward, "__name__", ""):
        return OwnProduct("its backend quantises the activations too", found)
    return found


def _shape_error(meta: dict[str, Any]) -> str | None:
    """The reason that the statistics are not one for each group, or None.

    One row of them would be spread over all groups without a word.
    """
    N, K = meta["shape"]
    size = meta["group_size"] or (K if meta["axis"] == 1 else N)
    wanted, both = N * K // size, meta.get("zero_scale")
    for i, (name, quantised, flag, inner) in enumerate(_STATISTICS):
        if meta.get(flag):
            found = math.prod(meta[inner]["shape"])
        else:
            held: Any = meta.get(quantised, meta.get(name)) if both is None else both[i]
            found = held.numel()
        if found != wanted:
            return (
                f"its {N} x {K} weight in groups of {size} has {found} {name}s, and {wanted} "
                "belong to it"
            )
    return None


def repacked(module: Any, weight: Tensor) -> State:
    """What the layer would hold for ``weight`` [N, K], quantised anew by HQQ."""
    config = copy.deepcopy(module.quant_config)
    whole = {**copy.deepcopy(config), "offload_meta": module.offload_meta}
    made = type(module)(None, whole, compute_dtype=module.compute_dtype, device=module.device)
    made.quantize(weight, **config)
    return State({"W_q": made.W_q, "meta": made.meta})
