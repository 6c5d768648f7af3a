"""Preparation of a model or a batch for training."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bases import experts
from ..ops.bases.formats import is_packed
from ..utils.private import fsdp_has_run
from ..utils.shards import put_data

# quantisations with packed weights, which cannot be cast
_QUANTISED = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a transformers model and cast its half-precision weights to float32, for training.

    Args:
        model: changed in place and returned.
        use_gradient_checkpointing: if the model is quantised, checkpoint its blocks and make its
            inputs require a gradient.
        gradient_checkpointing_kwargs: arguments of ``model.gradient_checkpointing_enable``.
        auto_clear_cache: return memory that is free after the cast to the accelerator.

    Raises:
        ValueError: FSDP2 (``fully_shard``) has run a forward of the model, and weights are to be
            cast. Nothing is changed.
    """
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    packed = method in _QUANTISED or bool(getattr(model, "hqq_quantized", False))
    in_bits = any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8))
    options = dict(gradient_checkpointing_kwargs or {})
    kept = _packed_parameters(model)
    halves = (torch.float16, torch.bfloat16)
    to_cast = [p for p in model.parameters() if p.dtype in halves and id(p) not in kept]
    if not packed:
        _check_shards(model, "prepare_model_for_kbit_training", to_cast)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if not packed:
        for parameter in to_cast:
            put_data(parameter, parameter.detach().to(torch.float32))
        if auto_clear_cache:
            for accelerator in (torch.cuda, torch.xpu):
                if accelerator.is_available():
                    accelerator.empty_cache()
    if not (use_gradient_checkpointing and (packed or in_bits)):
        return model
    # only reentrant checkpoints need inputs that require a gradient
    if options.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.requires_grad_(True)
            )
    known = inspect.signature(model.gradient_checkpointing_enable).parameters
    if "gradient_checkpointing_kwargs" in known:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return model
    if options:
        warnings.warn(
            "gradient_checkpointing_kwargs is not supported in this version of transformers. The "
            "passed kwargs will be ignored.",
            FutureWarning,
            stacklevel=2,
        )
    model.gradient_checkpointing_enable()
    return model


def _packed_parameters(model: nn.Module) -> set[int]:
    """The ids of weights and statistics of quantised layers and experts, which no cast may touch.

    A layer that its owner has made dense again has none.
    """
    found: set[int] = set()
    for module in model.modules():
        own = module._parameters.items()
        if is_packed(module) or experts.reader_of(module) is not None:
            found.update(id(p) for name, p in own if p is not None and not name.endswith("bias"))
        else:
            found.update(id(p) for _, p in own if type(p).__name__ == "Params4bit")
    return found


def _check_shards(model: nn.Module, function: str, to_cast: list[Any]) -> None:
    """Refuse to cast parameters that FSDP2 gathers from memory which the cast would not reach."""
    if to_cast and fsdp_has_run(model):  # after it the root's parameters may be whole ones
        raise ValueError(
            f"{function}: FSDP2 (`fully_shard`) has run a forward of `model`, and goes on with the "
            "dtypes that it found then; call it before the first forward, or before `fully_shard`"
        )


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to ``dtype`` and trained ones to float32, in place.

    Automatic mixed precision expects this of an adapted model. ``dtype`` is float16 or bfloat16.
    Packed weights and their scales stay as they are, whose numbers HF PEFT loses.

    Raises:
        ValueError: as for :func:`prepare_model_for_kbit_training`.
    """
    kept = _packed_parameters(model)
    changed = [
        p
        for p in model.parameters()
        if id(p) not in kept
        and p.is_floating_point()
        and p.dtype != (torch.float32 if p.requires_grad else dtype)
    ]
    _check_shards(model, "cast_mixed_precision_params", changed)
    for parameter in model.parameters():
        packed = id(parameter) in kept or not parameter.is_floating_point()
        if packed and not parameter.requires_grad:
            continue
        kind = torch.float32 if parameter.requires_grad else dtype
        put_data(parameter, parameter.detach().to(kind))


def shift_tokens_right(
    input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int
) -> Tensor:
    """A decoder's inputs [B, T] from its labels: the start token, then all labels but the last.

    -100 is replaced by the padding token; ValueError without a padding token.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
