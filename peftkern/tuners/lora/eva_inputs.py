"""The rows of a layer's inputs that EVA uses: how they are selected, moved and gathered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...utils.gathering import shares_weights


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The result of ``model(**inputs)``."""
    return model(**inputs)


def _first(layer_input: Any, layer_name: str) -> Tensor:
    if isinstance(layer_input, Tensor):
        return layer_input
    if isinstance(layer_input, (tuple, list)):
        return layer_input[0]
    raise TypeError(
        f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer "
        f"{layer_name}, please provide a custom prepare_layer_inputs_fn"
    )


def layer_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """All rows [M, K] of the layer's first argument [..., K]."""
    x = _first(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions, int64 [n, 2], of a batch's tokens that are no padding.

    With ``use_label_mask`` only those that have a label.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary"
        )
    settings: Any = peft_config.eva_config
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """The rows [n, K] of the layer's first argument [B, T, K] at the positions ``model_input``."""
    return _first(layer_input, layer_name)[model_input.T.unbind()]


def move_inputs_to_device(inputs: Any, device: torch.device) -> Any:
    """A batch with all of its tensors, in dicts and sequences too, on ``device``."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({k: move_inputs_to_device(v, device) for k, v in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(move_inputs_to_device(v, device) for v in inputs)
    warnings.warn(
        f"input of type {type(inputs)} could not be moved to the correct device", stacklevel=2
    )
    return inputs


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, one after the other; without torch.distributed ``rows`` itself."""
    if not shares_weights():
        return rows
    dist = torch.distributed
    ranks = dist.get_world_size()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = torch.empty(ranks, dtype=count.dtype, device=rows.device)
    dist.all_gather_into_tensor(counts, count)
    sizes = counts.tolist()
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
