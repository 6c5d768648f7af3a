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

from tests.models import INNER, WIDTH, config_of

E = 4
IDS = torch.arange(3, 15).view(2, 6)
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_FULL = {"layer_types": ["full_attention"] * 2}
_JAMBA = {
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "use_mamba_kernels": False,
}
# the first layer is dense
_SPARSE = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": E,
    "n_shared_experts": 1,
}
_NEMOTRON = {
    "layers_block_type": ["attention", "moe"],
    "n_routed_experts": E,
    "moe_shared_expert_intermediate_size": INNER,
    "mlp_hidden_act": "relu2",
}
_ERNIE = {"moe_layer_start_index": 1, "moe_num_experts": E, "moe_k": 2}
_V4 = {"n_routed_experts": E, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "head_dim": 16}
# {family: (class, head, settings)}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", "CausalLM", {}),
    "mixtral": ("Mixtral", "CausalLM", {"sliding_window": None}),
    "gpt_oss": ("GptOss", "CausalLM", {"sliding_window": 8}),
    "olmoe": ("Olmoe", "CausalLM", {}),
    "granitemoe": ("GraniteMoe", "CausalLM", {}),
    "phimoe": ("Phimoe", "CausalLM", {}),
    "glm4_moe": ("Glm4Moe", "CausalLM", _SPARSE),
    "ernie4_5_moe": ("Ernie4_5_Moe", "CausalLM", _ERNIE),
    "minimax": ("MiniMax", "CausalLM", {}),
    "flex_olmo": ("FlexOlmo", "CausalLM", {}),
    "hy_v3": ("HYV3", "CausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilter", "TokenClassification", {}),
    "aria": ("AriaText", "CausalLM", {}),
    "muse_spark": ("MuseSparkText", "", {"moe_hidden_size": 8, "mlp_layer_types": ["sparse"] * 2}),
    "nemotron_h": ("NemotronH", "CausalLM", _NEMOTRON),
    "deepseek_v4": ("DeepseekV4", "CausalLM", _V4),
    "jamba": ("Jamba", "CausalLM", _JAMBA),
    "lfm2_moe": ("Lfm2Moe", "CausalLM", {**_FULL, "num_dense_layers": 0}),
    "zaya": ("Zaya", "CausalLM", {"num_experts_per_tok": 1}),
    "dots1": ("Dots1", "CausalLM", {**_SPARSE, **_FULL}),
    "gemma4": ("Gemma4Text", "CausalLM", {**_FULL, "enable_moe_block": True, "top_k_experts": 2}),
    "deepseek_v2": ("DeepseekV2", "CausalLM", {**_SPARSE, **_MLA, "kv": 2}),
    "deepseek_v3": ("DeepseekV3", "CausalLM", {**_SPARSE, **_MLA, "kv": 2}),
    "qwen3_next": ("Qwen3Next", "CausalLM", _FULL),
    "minimax_m2": ("MiniMaxM2", "CausalLM", {}),
    "qwen2_moe": ("Qwen2Moe", "CausalLM", {}),
}

HEADS = {
    "CausalLM": tf.AutoModelForCausalLM,
    "TokenClassification": tf.AutoModelForTokenClassification,
    "": tf.AutoModel,
}
# compared with HF PEFT's names, numbers and files
COMPARED = (
    "deepseek_v2 deepseek_v3 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe minimax_m2 mixtral "
    "nemotron_h olmoe qwen2_moe qwen3_moe"
).split()
# {family: the names that a single expert's layers had: those of gate, up and down}
_QWEN, _MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
SINGLE = {
    family: _MIXTRAL if family in ("mixtral", "minimax_m2") else _QWEN
    for family in COMPARED
    # they had no such layers, or HF PEFT does not convert adapters of them
    if family not in ("gpt_oss", "granitemoe", "nemotron_h", "qwen2_moe")
}


def config(family: str) -> Any:
    """The configuration of a tiny model of the family."""
    cls, _, settings = FAMILIES[family]
    return config_of(cls, **settings)


@functools.cache
def _original(family: str) -> Any:
    torch.manual_seed(0)
    model = HEADS[FAMILIES[family][1]].from_config(config(family))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith(("bias", "sinks")):
                weight.normal_(std=0.2)
    model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model.eval()


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh model, its experts one after the other; the same weights each time."""
    return copy.deepcopy(_original(family)).to(dtype)


def targets_of(model: Any) -> tuple[list[str], list[str]]:
    """The names of the parameters of up and of down, for ``target_parameters``."""
    names = [n for n, _ in model.named_parameters() if ".experts." in n]
    ups = [n for n in names if n.endswith((".gate_up_proj", ".up_proj"))]
    return ups, [n for n in names if n.endswith(".down_proj")]


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
            add(f"{name}.{e}.{gate}", WIDTH, INNER)
            add(f"{name}.{e}.{up}", WIDTH, INNER)
            add(f"{name}.{e}.{down}", INNER, WIDTH)
    for name, module in model.named_modules():
        if name.endswith(f".{attention}"):
            add(name, module.in_features, module.out_features)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [gate, up, down, attention]
    peft.LoraConfig(r=r, lora_alpha=5, target_modules=targets).save_pretrained(folder)
