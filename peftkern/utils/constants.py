"""File names and defaults for architectures, HF PEFT's: each library reads the other's files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
ALL_EXPERTS_SHORTHAND = "all-experts"  # for target_parameters; HF PEFT has no such name
# a target that matches no module, on purpose
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
# with this many names or more, target_modules is reduced to the shortest suffixes that are enough
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
# names of the attributes in which transformers keeps a sequence classification head
SEQ_CLS_HEAD_NAMES = ("score", "classifier")

# float dtypes of this torch in which adapters are never kept
UPCAST_DTYPES = tuple(
    f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
)
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Default LoRA targets by `config.model_type`, grouped by the projections they share.
_LORA_TARGETS: dict[tuple[str, ...], str] = {
    ("q", "v"): "t5 mt5",
    ("q_proj", "v_proj"): (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
        "qwen2 qwen3"
    ),
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    model_type: list(targets)
    for targets, model_types in _LORA_TARGETS.items()
    for model_type in model_types.split()
}
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma4"] = (
    r".*language_model\..*\.(q_proj|v_proj)"
)

# Architectures whose caches need a layout of their own. The transformers versions that peftkern
# supports have none.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Convert a prefix to the layout of Bloom's caches before transformers 4.42.

    Args:
        past_key_values: tensors [layers, B, H, P, D] with 2L layers together, keys first.

    Returns:
        L pairs of keys [B·H, D, P] and values [B·H, P, D].
    """
    both = torch.cat(past_key_values)
    _, B, H, P, D = both.shape
    keys, values = both.chunk(2)
    # a reshape as in HF PEFT, which is not the transpose of P and D
    keys = keys.transpose(2, 3).reshape(-1, B * H, D, P)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))
