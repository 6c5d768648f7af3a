"""Tiny Llamas as GGUF files, in llama.cpp's layout, as its converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads * D, K] from the order of halves to that of pairs, head by head."""
    D = weight.shape[0] // heads
    order = [
        h * D + half * (D // 2) + i for h in range(heads) for i in range(D // 2) for half in (0, 1)
    ]
    return weight[order]


def write_llama(model: Any, path: Path, tokenizer: Any = None) -> Path:
    """Write a LlamaForCausalLM as ``path`` (.gguf) in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, weight.detach().to(torch.float32).contiguous().numpy())
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [known.get(i, f"[unused{i}]") for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if i in special else 1 for i in range(size)])
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
