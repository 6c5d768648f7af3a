"""Facts about a saved adapter: its tensors, ranks and norms, and what loads it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.base import PeftConfig
from ..files.base_names import name_from_file
from ..utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .base_file import gguf_file_in
from .plain import Layer, layers_of
from .serving import TARGETS, Adapter, refusals


def find_adapter(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(file of tensors, configuration beside it or None) of a folder or a file.

    Raises:
        ValueError: there is no such place, or no adapter in it.
    """
    place = Path(path)
    if place.is_dir():
        names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        found = next((place / name for name in names if (place / name).is_file()), None)
        if found is None:
            inside = sorted(p.parent.name for p in place.glob(f"*/{CONFIG_NAME}"))
            more = f"; there are adapters in {', '.join(inside)}" if inside else ""
            raise ValueError(f"{place} holds neither {names[0]} nor {names[1]}{more}")
    elif place.is_file():
        if place.suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{place}: must be a folder, a .safetensors or a .bin file")
        found = place
    else:
        raise ValueError(f"{place}: no such file or folder")
    config = found.parent / CONFIG_NAME
    return found, config if config.is_file() else None


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(values of the configuration, tensors by names on disk) of a folder or a file.

    The configuration is empty where none is beside the file. Tensors that are not finite are read
    too.

    Raises:
        ValueError: there is no adapter, or a file is damaged.
    """
    file, config = find_adapter(path)
    values = PeftConfig.from_json_file(config) if config is not None else {}
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise ValueError(f"{file} is truncated, damaged or no file of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file} must hold a dict of tensors")
    return values, tensors


def facts(path: str | os.PathLike[str], max_rank: int | None = None) -> dict[str, Any]:
    """All that the table of an adapter shows, as JSON values.

    Norms are Frobenius norms, computed in float64: of A, of B, of B A, and of the update s B A.
    Of experts that share a tensor, they are over all experts.

    Raises:
        ValueError: there is no adapter at ``path``, or its file is damaged.
    """
    config, tensors = read_adapter(path)
    file, _ = find_adapter(path)
    known = {"r": 1, "lora_alpha": math.nan, **config}
    lora = config.get("peft_type", "LORA") == "LORA"
    layers = [_layer_facts(layer, known) for layer in layers_of(known, tensors)] if lora else []
    used = {key for layer in layers for key in layer.pop("keys")}
    others = [
        {"name": name, "shape": list(t.shape), "dtype": _dtype(t), "norm": _norm(t)}
        for name, t in tensors.items()
        if name not in used
    ]
    base = config.get("base_model_name_or_path")
    return {
        "file": str(file),
        "method": config.get("peft_type"),
        "task": config.get("task_type"),
        "format": config.get("peft_version"),
        "base": {
            "name": name_from_file(base, file.parent) if isinstance(base, str) else base,
            "revision": config.get("revision"),
            "gguf_file": gguf_file_in(config.get("auto_mapping")),
        },
        "settings": _settings(config),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dtypes": dict(Counter(_dtype(t) for t in tensors.values())),
        "ranks": dict(sorted(Counter(str(layer["r"]) for layer in layers).items())),
        "not_finite": sorted(name for name, t in tensors.items() if _norm(t) is None),
        "layers": layers,
        "others": others,
        "loads": _loads(config, tensors, max_rank),
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are neither empty nor about the file itself."""
    about = {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"}
    about |= {"auto_mapping", "inference_mode", "megatron_core", "qalora_group_size"}
    return {
        name: value
        for name, value in sorted(config.items())
        if name not in about and value not in (None, False, [], {}, "none")
    }


def _layer_facts(layer: Layer, config: dict[str, Any]) -> dict[str, Any]:
    A, B = layer.A.to(torch.float64), layer.B.to(torch.float64)
    r = layer.A.shape[0]
    experts = r // layer.r if config.get("target_parameters") and layer.r else 1
    if experts > 1 and A.dim() == 2:
        r = layer.r
        A_each = A.reshape(experts, r, -1)
        B_each = B.reshape(B.shape[0], r, experts).permute(2, 0, 1)
    else:
        A_each = A.reshape(1, r, -1)
        B_each = B.reshape(1, -1, r)  # a convolution's B is 1 x 1
    # ‖B A‖² = sum of (Bᵀ B) * (A Aᵀ), without the product
    product = (B_each.transpose(1, 2) @ B_each) * (A_each @ A_each.transpose(1, 2))
    norm = math.sqrt(max(float(product.sum()), 0.0)) if bool(product.isfinite().all()) else None
    scale = None if math.isnan(layer.scale) else layer.scale
    return {
        "name": layer.name,
        "keys": (layer.key_A, layer.key_B),
        "kind": "embedding" if layer.embedding else "experts" if experts > 1 else "layer",
        "r": r,
        "alpha": None if math.isnan(layer.alpha) else layer.alpha,
        "scale": scale,
        "A": list(layer.A.shape),
        "B": list(layer.B.shape),
        "dtype": _dtype(layer.A),
        "norm_A": _norm(layer.A),
        "norm_B": _norm(layer.B),
        "norm_BA": norm,
        "norm_update": None if norm is None or scale is None else abs(scale) * norm,
    }


def _norm(tensor: Tensor) -> float | None:
    """The Frobenius norm; None when it is not finite."""
    norm = float(torch.linalg.vector_norm(tensor.to(torch.float64)))
    return norm if math.isfinite(norm) else None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loads(
    config: dict[str, Any], tensors: dict[str, Tensor], max_rank: int | None
) -> dict[str, dict[str, Any]]:
    """{program: whether it reads the adapter as it is, the reasons if not, what export mends}."""
    if not config:
        return {}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    adapter = Adapter(config, shapes, *([max_rank] if max_rank else []))
    version = config.get("peft_version")
    found: dict[str, dict[str, Any]] = {
        "peft": {"name": f"HF PEFT {version or ''}".strip(), "reads": True, "reasons": []}
    }
    for target, name in TARGETS.items():
        reasons = refusals(target, adapter)
        never = refusals(target, adapter, mended=False)
        entry = {"name": name, "reads": not reasons, "reasons": reasons}
        found[target] = {**entry, "export_mends": bool(reasons) and not never}
    return found


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, allow_nan=False)
