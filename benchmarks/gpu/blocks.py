"""The pieces of a Llama that are measured: one linear, q/k/v, the MLP, a whole decoder layer.

Each is a module that takes X [M, K] and returns its outputs as a tuple.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .cases import MEMBERS, MODELS, Case, Llama


class OneLinear(nn.Module):
    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (getattr(self, self.name)(x),)


class Qkv(nn.Module):
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Gated(nn.Module):
    """An MLP whose forward peftkern knows, so that it may train as one operation."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Mlp(nn.Module):
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.mlp = Gated(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.mlp(x),)


class Layer(nn.Module):
    """transformers' own decoder layer, on one sequence or on several of equal length."""

    def __init__(self, decoder: nn.Module, cos: Tensor, sin: Tensor, length: int) -> None:
        super().__init__()
        self.decoder, self.length = decoder, length
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.decoder(
            x.view(-1, self.length, x.shape[-1]), position_embeddings=(self.cos, self.sin)
        )
        out = out[0] if isinstance(out, tuple) else out
        return (out.reshape(x.shape),)


def llama_config(shape: Llama, layers: int | None = None) -> Any:
    """transformers' config for these shapes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.wide,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv * shape.heads // shape.hidden,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
        use_cache=False,
    )


def sequence(M: int) -> int:
    """The number of tokens in one sequence, when a batch has M tokens."""
    return M // 4 if M >= 8192 and M % 4 == 0 else M


def bare_linear(weight: Tensor) -> nn.Linear:
    """A frozen ``nn.Linear`` that holds ``weight`` [N, K] itself, not a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def build(case: Case, device: torch.device, seed: int) -> nn.Module:
    """A frozen block with drawn weights of variance 1 / K."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    for name, (K, N) in case.shapes.items():
        weight = torch.empty((N, K), dtype=dtype, device=device).normal_(std=K**-0.5)
        layers[name] = bare_linear(weight)
    if case.block == "linear":
        return OneLinear(case.proj, layers[case.proj])
    if case.block in ("qkv", "mlp"):
        return (Qkv if case.block == "qkv" else Mlp)(layers)
    from transformers.models.llama import modeling_llama

    config = llama_config(MODELS[case.model], 1)
    with torch.device("meta"):
        decoder = modeling_llama.LlamaDecoderLayer(config, 0)
    for norm in (decoder.input_layernorm, decoder.post_attention_layernorm):
        norm.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=device))
    for name, layer in layers.items():
        owner = decoder.self_attn if hasattr(decoder.self_attn, name) else decoder.mlp
        setattr(owner, name, layer)
    length = sequence(case.M)
    rotary = modeling_llama.LlamaRotaryEmbedding(config).to(device)
    where = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), where)
    return Layer(decoder, cos, sin, length).requires_grad_(False)


def share(block: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights and buffers."""
    kept = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(t): t for t in kept})


def linears(block: nn.Module, case: Case) -> dict[str, nn.Module]:
    """{projection: module, adapted or not}, wherever it is within ``block``."""
    wanted = {case.proj} if case.block == "linear" else set(MEMBERS[case.block])
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if last in wanted and last not in found:
            found[last] = module
    return found
