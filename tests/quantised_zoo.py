"""One layer of each quantised format, made of a linear layer by its owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.packed_layers import Awq, Gptq
from tests.quantised_models import bnb4, bnb8


def _fp8(block: tuple[int, int] | None) -> Callable[[nn.Linear], Any]:
    def make(linear: nn.Linear) -> Any:
        from tests.test_bases_fp8 import finegrained

        return finegrained(linear, block)

    return make


def _ours(linear: nn.Linear) -> Any:
    from peftkern.ops.bases.fp8_linear import Fp8Linear

    return Fp8Linear(linear)


def _ao_fp8(linear: nn.Linear) -> Any:
    from tests.test_bases_fp8 import torchao_layer

    return torchao_layer(linear)


def _integers(way: str, **more: Any) -> Callable[[nn.Linear], Any]:
    def make(linear: nn.Linear) -> Any:
        from tests.test_bases_int import quantised

        return quantised(linear, way, **more)

    return make


def _hqq(linear: nn.Linear) -> Any:
    from tests.test_bases_hqq import hqq

    return hqq(linear)


def _compressed(name: str) -> Callable[[nn.Linear], Any]:
    def make(linear: nn.Linear) -> Any:
        from compressed_tensors.compressors import compress_module
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

        from tests.test_bases_compressed import SCHEMES, calibrate

        holder = nn.Sequential(linear)
        config = QuantizationConfig(config_groups={"all": SCHEMES[name].model_copy(deep=True)})
        apply_quantization_config(holder, config, show_progress=False)
        calibrate(holder[0])
        compress_module(holder[0])
        return holder[0].requires_grad_(False)

    return make


LAYERS: dict[str, Callable[[nn.Linear], Any]] = {
    "bitsandbytes NF4": lambda m: bnb4(m, quant_type="nf4"),
    "bitsandbytes NF4 in bf16": lambda m: bnb4(m, quant_type="nf4", quant_storage=torch.bfloat16),
    "bitsandbytes int8": bnb8,
    "peftkern fp8": _ours,
    "transformers fp8": _fp8((32, 16)),
    "transformers fp8, one scale": _fp8(None),
    "torchao fp8": _ao_fp8,
    "torchao int8": _integers("ao int8"),
    "torchao int4": _integers("ao int4 in groups"),
    "torchao int8, X too": _integers("ao dynamic"),
    "torchao int4, X too": _integers("ao dynamic int4"),
    "quanto int8": _integers("int8"),
    "quanto int4": _integers("int4"),
    "quanto fp8": _integers("float8"),
    "HQQ": _hqq,
    "compressed-tensors W8A8": _compressed("W8A8"),
    "compressed-tensors W4A16": _compressed("W4A16 with zero points"),
    "compressed-tensors FP8": _compressed("FP8"),
    "compressed-tensors NVFP4": _compressed("NVFP4A16"),
    "GPTQ": Gptq,
    "AWQ": Awq,
}
