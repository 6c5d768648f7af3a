"""Quantisation to NF4 and int8 and back, and LoftQ for a model that is quantised already."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

PREFIX = "base_model.model."


BLOCK = 64  # number of values that share a scale
# NF4: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4(W: Tensor) -> Tensor:
    """W rounded to NF4, as float32, in blocks of 64 values, each scaled by its largest value."""
    flat = W.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, device=W.device)
    middles = (codes[1:] + codes[:-1]) / 2
    nearest = codes[torch.bucketize(padded / scale.clamp(min=torch.finfo().tiny), middles)]
    return (nearest * scale).view(-1)[: flat.numel()].view(W.shape)


def int8(W: Tensor) -> Tensor:
    """W [N, K], as float32, rounded to float16, then to 255 values scaled by each row's largest."""
    W = W.to(torch.float16).float()
    scale = W.abs().amax(1, keepdim=True)
    codes = (W * (127 / scale.clamp(min=torch.finfo().tiny))).round()
    return codes * scale / 127


def low_rank(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A [r, K], B [N, r]): B A is the best approximation of rank r of ``residual`` [N, K]."""
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


class _Files:
    """The tensors of a model's safetensors file or shards, read one at a time."""

    def __init__(self, model: Any, model_path: str | os.PathLike[str] | None) -> None:
        if model_path is None:
            try:
                model_path = snapshot_download(
                    model.base_model.config.name_or_path, local_files_only=True
                )
            except (AttributeError, HFValidationError) as exc:
                raise ValueError(
                    "The provided model does not appear to be a transformers model or is a local "
                    "model. In this case, you must pass the model_path argument that points to the "
                    "safetensors file."
                ) from exc
            except LocalEntryNotFoundError as exc:
                raise ValueError(
                    "The model.safetensors file must be present on disk, but it could not be found."
                ) from exc
        path = Path(model_path)
        path = path if path.name.endswith("model.safetensors") else path / "model.safetensors"
        self.base_prefix = getattr(model.get_base_model(), "base_model_prefix", "") + "."
        index = path.parent / "model.safetensors.index.json"
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                self.where = dict.fromkeys(file.keys(), path)
        elif index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.where = {k: path.parent / Path(file).name for k, file in shards.items()}
        else:
            raise FileNotFoundError(
                f"Could not find file for {path}, ensure that there is a (sharded) safetensors "
                "file of the model."
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, which the file may have with the base model's prefix or without."""
        short = name.removeprefix(self.base_prefix)
        found = next((n for n in (name, short) if n in self.where), None)
        if found is None:
            raise ValueError(f"there is no tensor {name!r} in the model's safetensors files")
        with safe_open(self.where[found], framework="pt") as file:
            tensor: Tensor = file.get_tensor(found)
            return tensor


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set A and B of layers with bitsandbytes 4-bit weights to the low-rank part of their error.

    The error is that of the quantisation. (LoftQ with one step, Li et al., 2023, arXiv 2310.08659.)

    Args:
        peft_model: the model with the adapter.
        model_path: the model's safetensors file or its folder; None: the hub's local cache.
        adapter_name: the adapter.
        callback: called with the model and a layer's name after each layer; when it returns False,
            that layer gets its former A and B back.

    Raises:
        ValueError: bitsandbytes is missing, no layer has such a weight, or the file lacks a tensor.
        FileNotFoundError: no such file.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("bitsandbytes must be installed and the model must be quantized in 4bits.")
    bitsandbytes = importlib.import_module("bitsandbytes")
    layers = []
    for name, module in peft_model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, bitsandbytes.nn.Linear4bit) and adapter_name in module.lora_A:
            if not name.startswith(PREFIX):
                raise TypeError("The passed model does not appear to be a valid PeftModel")
            layers.append((name.removeprefix(PREFIX), module))
    if not layers:
        raise ValueError("No bnb LoRA module found on the model")
    files = _Files(peft_model, model_path)
    for name, module in layers:
        packed = module.get_base_layer().weight
        Q = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        W = files.tensor(f"{name}.weight").to(device=Q.device, dtype=torch.float32)
        found = low_rank(W - Q, module.r[adapter_name])
        weights = (module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight)
        before = [weight.detach().clone() for weight in weights]
        for weight, value in zip(weights, found, strict=True):
            weight.copy_(value)
        if callback is not None and not callback(peft_model, name):
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
