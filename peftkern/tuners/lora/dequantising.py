"""Dense linear layers in place of quantised ones; what a model's configuration says of either."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...ops.bases import experts
from ...ops.bases.formats import numbers, reader_of
from ...ops.bases.fp8_linear import BLOCK, Fp8Linear
from ...utils.private import hook_of
from ..base_layer import BaseTunerLayer
from .dense_experts import Family, dense_experts, note_layout, why_not_dense
from .linear import bare_linear
from .offload import offloading


@contextmanager
def made_dense(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Replace what is quantised in ``model`` by dense modules; back if the block fails.

    Linear layers become ``nn.Linear``, a mixture's experts the dense class of the model's family.

    Args:
        model: the base model, with adapters.
        dtype: the dtype of the dense weights; None: the model's (``model.dtype``), or float32.

    Raises:
        ValueError: ``dtype`` is not floating point, a layer cannot be read, or adapters are merged
            into one. Nothing is changed then.
    """
    if dtype is None:
        own = getattr(model, "dtype", None)
        dtype = own if isinstance(own, torch.dtype) and own.is_floating_point else torch.float32
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"dequantize is {dtype!r}; allowed: True, or a floating-point dtype of at least 16 bits"
        )
    every = list(model.named_modules(remove_duplicate=False))
    found = [(name, m) for name, m in every if reader_of(m) is not None]
    mixtures = [(name, m) for name, m in every if experts.reader_of(m) is not None]
    family = Family(model)
    adapted = {
        id(m.get_base_layer()): name
        for name, m in every
        if isinstance(m, BaseTunerLayer) and m.merged_adapters
    }
    for name, module in found + mixtures:
        held: Any = None
        if reader_of(module) is None:
            held = why_not_dense(name, module, family)
        else:
            held = numbers(module)
        if offloading(module):
            held = "accelerate keeps its weight in host memory or on disk"
        if isinstance(held, str):
            raise ValueError(f"`{name}` cannot be made dense: {held}")
        if id(module) in adapted:
            raise ValueError(
                f"`{adapted[id(module)]}` has merged adapters, of which the quantised weight holds "
                "a rounded sum; call unmerge_adapter() first"
            )
    replaced: list[tuple[str, nn.Module]] = []
    made: dict[nn.Module, nn.Module] = {}  # a module may stand in several places
    try:
        for name, module in found + mixtures:
            if module not in made:
                linear = reader_of(module) is not None
                made[module] = (
                    _dense(module, dtype) if linear else dense_experts(name, module, family, dtype)
                )
            model.set_submodule(name, made[module])
            replaced.append((name, module))
        if mixtures:
            note_layout(model)
        yield
    except BaseException:
        for name, module in replaced:
            model.set_submodule(name, module)
        if mixtures:
            note_layout(model)
        raise


def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    held: Any = numbers(module)
    bias = None if held.bias is None else held.bias.detach().to(dtype)
    dense = bare_linear(held.packed.dense(dtype), bias, trainable=False).train(module.training)
    if (hook := hook_of(module)) is not None:
        accelerate: Any = sys.modules["accelerate.hooks"]  # it has given the layer its hook
        accelerate.add_hook_to_module(dense, copy.copy(hook))
    return dense


def forget_quantization(model: Any) -> None:
    """Take the marks of quantisation from a transformers model, which is dense now."""
    for name in ("hf_quantizer", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, name):
            setattr(model, name, False)


def name_quantization(model: Any) -> None:
    """Say in a transformers model's configuration that layers are :class:`.Fp8Linear`.

    Their names and shapes in a checkpoint are those of transformers' FineGrainedFP8, so that
    ``save_pretrained`` then writes what ``from_pretrained`` reads; without it the e4m3 numbers
    would be taken for weights. Nothing is changed where there are no such layers, or where the
    configuration names a quantisation already. Weights of which transformers would read the blocks
    wrongly are told in a logged warning.
    """
    config: Any = getattr(model, "config", None)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {n: m for n, m in linears.items() if isinstance(m, Fp8Linear)}
    if not packed or not hasattr(model, "save_pretrained"):
        return
    if getattr(config, "quantization_config", None) is None:
        from transformers import FineGrainedFP8Config

        config.quantization_config = FineGrainedFP8Config(
            weight_block_size=BLOCK, modules_to_not_convert=[n for n in linears if n not in packed]
        )
        # it divides a side by the number of its blocks, so the last one must be whole
        ragged = [n for n, m in packed.items() if _ragged(m.weight)]
        if ragged:
            logging.getLogger("peftkern").warning(
                "%d fp8 weights (`%s` is one) have a side that is no multiple of 128: transformers "
                "dequantises those of a saved model wrongly, or refuses them. "
                "`merge_and_unload(dequantize=True)` exports dense weights.",
                len(ragged),
                ragged[0],
            )


def _ragged(weight: torch.Tensor) -> bool:
    return any(side % block for side, block in zip(weight.shape, BLOCK, strict=True))
