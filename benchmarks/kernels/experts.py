"""Layers of mixtures of experts, and their routes on the meta device, for entries of kernels."""

from __future__ import annotations

from typing import NamedTuple

from peftkern.kernels.experts_route import Route, most_tiles

from .entry import INT32, meta


class Layer(NamedTuple):
    """T tokens, each with k of the experts, whose linears are [2 inner, width], [width, inner]."""

    T: int
    k: int
    experts: int
    width: int
    inner: int


LAYERS = {
    "qwen3": Layer(8192, 8, 128, 2048, 768),  # Qwen3-30B-A3B
    "gpt-oss": Layer(8192, 4, 32, 2880, 2880),  # gpt-oss-20b
    "mixtral": Layer(8192, 2, 8, 4096, 14336),
    "few": Layer(16, 8, 128, 2048, 768),  # Qwen3-30B-A3B, a batch of decoding
}


def meta_route(layer: Layer, adapters: int = 1, block_m: int = 128) -> Route:
    """A route of a layer's pairs on the meta device."""
    P, groups = layer.T * layer.k, layer.experts * adapters
    tiles = most_tiles(P, groups, block_m)
    shapes = (P, groups + 1, tiles, tiles)
    parts = [meta(n, dtype=INT32) for n in shapes]
    return Route(*parts, block_m, layer.k, layer.experts, adapters)
