"""An adapter in the plain form that every program reads: one rank, one scale alpha / r, a list.

s_i B_i A_i of each layer stays what it was: A_i gets rows of zeros and B_i columns of zeros up to
the largest rank R, and B_i is multiplied by s_i / s, where s = alpha' / R is the scale of most
layers. Of an adapter that has one rank and one scale no number changes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.module_tree import get_pattern_key
from .slots import PREFIX

_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.weight)?$")


class Layer(NamedTuple):
    """A and B of one layer, by its name in the base model, and the rank, alpha and scale."""

    name: str
    key_A: str
    key_B: str
    A: Tensor
    B: Tensor
    r: int
    alpha: float
    scale: float
    embedding: bool


def layers_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Layer]:
    """The layers of a LoRA adapter, in the order of the file.

    Args:
        config: the values of ``adapter_config.json``.
        tensors: its tensors by names on disk.

    Raises:
        ValueError: A or B is missing, or their ranks differ.
    """
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        part = _PART.match(key)
        if part is None:
            continue
        found.setdefault(part["module"], {})[part["factor"]] = key, tensor
        if part["kind"]:
            embeddings.add(part["module"])
    layers = []
    for name, parts in found.items():
        if len(parts) == 1:
            have = next(iter(parts))
            raise ValueError(f"{name} has {have} and no {'B' if have == 'A' else 'A'}")
        (key_A, A), (key_B, B) = parts["A"], parts["B"]
        short = name.removeprefix(PREFIX)
        r, alpha = _rank_and_alpha(config, short)
        if A.shape[0] != B.shape[1]:
            raise ValueError(f"{name}: A is {list(A.shape)} and B {list(B.shape)}")
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        layers.append(Layer(short, key_A, key_B, A, B, r, alpha, scale, name in embeddings))
    return layers


def _rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    if name.endswith(".experts.base_layer"):  # patterns name the parameters of experts
        name = name.removesuffix(".base_layer") + ".gate_up_proj"
    elif name.endswith(".experts"):
        name += ".down_proj"
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks, name), config["r"])
    return int(r), float(alphas.get(get_pattern_key(alphas, name), config["lora_alpha"]))


def plain_form(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of the same adapter in the plain form.

    Every tensor is a factor of a layer; factors are computed in float64 and keep their dtypes.

    Raises:
        ValueError: a layer's rank is not what the configuration says.
    """
    layers = layers_of(config, tensors)
    for layer in layers:
        if layer.A.shape[0] != layer.r:
            raise ValueError(
                f"{layer.name} has the rank {layer.A.shape[0]}, and the configuration says "
                f"{layer.r}"
            )
    R = max(layer.r for layer in layers)
    scale = Counter(layer.scale for layer in layers).most_common(1)[0][0]
    plain = dict(tensors)
    for layer in layers:
        A, B = layer.A, layer.B
        if layer.scale != scale:
            B = (B.to(torch.float64) * (layer.scale / scale)).to(B.dtype)
        if layer.r < R:
            A = torch.cat([A, A.new_zeros(R - layer.r, *A.shape[1:])], 0)
            B = torch.cat([B, B.new_zeros(B.shape[0], R - layer.r, *B.shape[2:])], 1)
        plain[layer.key_A], plain[layer.key_B] = A.contiguous(), B.contiguous()
    alpha = scale * R
    changed: dict[str, Any] = {
        "r": R,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if isinstance(config.get("target_modules"), str):
        changed["target_modules"] = _listed(layers, config)
    return {**config, **changed}, plain


def _listed(layers: list[Layer], config: Mapping[str, Any]) -> list[str] | str:
    """A list of names of the layers that a pattern stands for; "all-linear" as it is."""
    targets: str = config["target_modules"]
    if targets == "all-linear":
        return targets
    return sorted(layer.name for layer in layers)
