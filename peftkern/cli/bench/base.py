"""The base model that ``peftkern bench`` measures on: the user's, or a small random Llama."""

from __future__ import annotations

from typing import Any

import torch

from ..modelio import load_model, locate_model
from .settings import BenchSettings


def base_of(settings: BenchSettings) -> Any:
    """The model of ``--model`` on the CPU, else a random Llama; the same weights at every call."""
    dtype = getattr(torch, settings.dtype)
    if settings.model is not None:
        return load_model(*_placed(settings), dtype=dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 4,
        "vocab_size": 2048,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).to(dtype)


def _placed(settings: BenchSettings) -> tuple[str, str, str | None]:
    folder, gguf_file = locate_model(settings.model or "", settings.gguf_file)
    return folder, "causal_lm", gguf_file
