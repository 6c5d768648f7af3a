"""Tiny mixtures of families with fused experts, and adapters with a layer for each expert."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from safetensors.torch import save_file

D, INNER, E, HEADS = 16, 24, 4, 2
IDS = torch.arange(3, 23).view(2, 10)
_SIZES = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": D // HEADS,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# {family: (name of its classes, what is special in its configuration)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", _MLA),
    "deepseek_v3": ("DeepseekV3", _MLA),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_layer_start_index": 1}),
    "flex_olmo": ("FlexOlmo", {}),
    "glm4_moe": ("Glm4Moe", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("GptOss", {"sliding_window": 8}),
    "granitemoe": ("GraniteMoe", {}),
    "minimax_m2": ("MiniMaxM2", {}),
    "mixtral": ("Mixtral", {"sliding_window": None}),
    "nemotron_h": ("NemotronH", {"layers_block_type": ["attention", "moe"]}),
    "olmoe": ("Olmoe", {}),
    "qwen2_moe": ("Qwen2Moe", {}),
    "qwen3_moe": ("Qwen3Moe", {}),
}
# {family: the names that a single expert's layers had: those of gate, up and down}
_QWEN, _MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
SINGLE = {
    family: _MIXTRAL if family in ("mixtral", "minimax_m2") else _QWEN
    for family in FAMILIES
    # they had no such layers, or HF PEFT does not convert adapters of them
    if family not in ("gpt_oss", "granitemoe", "nemotron_h", "qwen2_moe")
}


def config(family: str, **own: Any) -> Any:
    """The configuration of a tiny model of the family."""
    name, special = FAMILIES[family]
    cls = getattr(tf, f"{name}Config")
    names = set(cls().to_dict()) | set(getattr(cls, "attribute_map", ()))
    settings = {k: v for k, v in _SIZES.items() if k in names}
    return cls(**settings | special | own)


@functools.cache
def _original(family: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(family)).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith(("bias", "sinks")):
                weight.normal_(std=0.2)
    model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


def make(family: str) -> Any:
    """A fresh float64 model; the same weights each time."""
    return copy.deepcopy(_original(family))


def outputs(model: Any) -> torch.Tensor:
    """The last hidden states, in float64; some families compute logits in float32 always."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return base.model(input_ids=IDS).last_hidden_state


def gradients(model: Any) -> list[torch.Tensor]:
    """Of what trains, of a weighted sum of the last hidden states, by name."""
    hidden = model.get_base_model().model(input_ids=IDS).last_hidden_state
    g = torch.Generator().manual_seed(3)
    (hidden * torch.randn(hidden.shape, generator=g, dtype=hidden.dtype)).sum().backward()
    trains = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in trains]


def experts_of(model: Any) -> dict[str, Any]:
    """{name: module} of the modules that hold fused experts."""
    return {name: m for name, m in model.named_modules() if name.endswith(".experts")}


def save_single(folder: Path, family: str, r: int = 3, attention: str = "o_proj") -> None:
    """An adapter with a layer for each projection of each expert, as of transformers 4."""
    g = torch.Generator().manual_seed(1)
    gate, up, down = SINGLE[family]
    weights = {}

    def add(name: str, k: int, n: int) -> None:
        for side, shape in (("A", (r, k)), ("B", (n, r))):
            drawn = torch.randn(shape, generator=g, dtype=torch.float64) * 0.3
            weights[f"base_model.model.{name}.lora_{side}.weight"] = drawn

    model = make(family)
    for name in experts_of(model):
        if gate == "w1":
            name = name.replace("mlp.experts", "block_sparse_moe.experts")
        for e in range(E):
            add(f"{name}.{e}.{gate}", D, INNER)
            add(f"{name}.{e}.{up}", D, INNER)
            add(f"{name}.{e}.{down}", INNER, D)
    for name, module in model.named_modules():
        if name.endswith(f".{attention}"):
            add(name, module.in_features, module.out_features)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [gate, up, down, attention]
    peft.LoraConfig(r=r, lora_alpha=5, target_modules=targets).save_pretrained(folder)
