"""transformers' experts of a mixture, bare and with adapters of a library on all of them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .providers import ALPHA

PARAMETERS = ("gate_up_proj", "down_proj")


class Sizes(NamedTuple):
    """k of E experts for a token, with linears [2·I, D] and [D, I].

    ``gpt_oss``: weights are transposed, there are biases, and the gate is clamped and interleaved.
    """

    k: int
    E: int
    D: int
    I: int  # noqa: E741  # as everywhere for mixtures
    gpt_oss: bool = False


def experts(s: Sizes, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Frozen experts, by transformers' grouped products; their weights have not been written to."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any
    kind: type[nn.Module] = Qwen3MoeExperts
    if s.gpt_oss:
        kind = GptOssExperts
        config = GptOssConfig(
            hidden_size=s.D, intermediate_size=s.I, num_local_experts=s.E, num_experts_per_tok=s.k
        )
    else:
        config = Qwen3MoeConfig(
            hidden_size=s.D, moe_intermediate_size=s.I, num_experts=s.E, num_experts_per_tok=s.k
        )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        return kind(config).to(dtype).requires_grad_(False)


def adapted(library: str, model: nn.Module, r: int, fp32: bool) -> Any:
    """``model``, whose module ``experts`` gets adapters of the library on both parameters.

    Raises:
        RuntimeError: the adapters have another dtype than asked for.
    """
    lib = importlib.import_module(library)
    config = lib.LoraConfig(
        r=r, lora_alpha=ALPHA * r, target_modules=[],
        target_parameters=[f"experts.{name}" for name in PARAMETERS],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lib.get_peft_model(model, config, autocast_adapter_dtype=fp32)
    want = torch.float32 if fp32 else next(p for p in model.parameters() if p.dim() == 3).dtype
    found = {t.dtype for pair in factors(model).values() for t in pair}
    if found != {want}:
        raise RuntimeError(f"{library} made adapters of {found}, expected {want}")
    return model


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter: (A [r·E, K], B [N, r·E])} of an adapted model; expert e has every E-th column."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            found[layer.parameter_name] = weights
    return {name: found[name] for name in PARAMETERS if name in found}
