"""Small mixtures of experts: one class for each flag of the interface, and tiny models.

A :class:`Tiny` is a router and experts between an embedding and a head, so that a test of the
wrapper needs no whole model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

import peftkern
from peftkern.tuners.lora.parameter import ParamWrapper
from tests.tiny import fill

EXPERTS, WIDTH, INNER, CHOICES, VOCAB = 5, 8, 16, 2, 16

# {name: flags of use_experts_implementation, and what the class computes beside them}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "bias": {"has_bias": True},
    "no_gate": {"has_gate": False},
    "no_gate_bias_transposed": {"has_gate": False, "has_bias": True, "is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "post_norm": {"has_post_expert_norm": True},
}
if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
    del FLAGS["post_norm"]  # transformers 5.17


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _Experts(nn.Module):
    """Experts as transformers writes them, with the forward that runs one after the other."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        flags = self.flags
        self.num_experts = EXPERTS
        first = INNER if not flags.get("has_gate", True) else 2 * INNER
        self.up_name = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
        for name, n, k in ((self.up_name, first, WIDTH), ("down_proj", WIDTH, INNER)):
            shape = (EXPERTS, k, n) if flags.get("is_transposed") else (EXPERTS, n, k)
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.5))
            if flags.get("has_bias"):
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n) * 0.5))
        self.act_fn = ACT2FN["silu"]
        if flags.get("has_post_expert_norm"):
            self.post_expert_norm = Norm()

    def _linear(self, x: Tensor, name: str, e: int) -> Tensor:
        weight = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.flags.get("has_bias") else None
        if self.flags.get("is_transposed"):
            weight = weight.t()
        return nn.functional.linear(x, weight, bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, choice = torch.where(top_k_index == e)
            h = self._linear(hidden_states[token], self.up_name, e)
            gated = self.flags.get("has_gate", True)
            y = self._linear(self._apply_gate(h) if gated else self.act_fn(h), "down_proj", e)
            if self.flags.get("has_post_expert_norm"):
                y = self.post_expert_norm(y)
            y = y * top_k_weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _interleaved(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2]
    return gate * torch.sigmoid(gate) * (up + 1)


def _make(name: str) -> Any:
    flags = FLAGS[name]
    members: dict[str, Any] = {"flags": flags, "__module__": __name__, "__init__": _own_init}
    members["forward"] = _own_forward()
    if name == "interleaved":
        members["_apply_gate"] = _interleaved
    made = type(f"Experts_{name}", (_Experts,), members)
    return use_experts_implementation(made, **flags)


def _own_init(self: Any, config: Any) -> None:
    _Experts.__init__(self, config)


def _own_forward() -> Any:
    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        return _Experts.forward(self, hidden_states, top_k_index, top_k_weights)

    return forward


CLASSES = {name: _make(name) for name in FLAGS}
globals().update({cls.__name__: cls for cls in CLASSES.values()})  # for pickle


class Tiny(nn.Module):
    """Token ids [B, S] to logits [B, S, VOCAB] through one mixture."""

    def __init__(self, kind: str, implementation: str = "eager") -> None:
        super().__init__()
        self.config = tf.PreTrainedConfig()
        self.config._experts_implementation = implementation
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = CLASSES[kind](self.config)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        weights, index = self.choose(x)
        return self.head(x + self.experts(x.reshape(-1, WIDTH), index, weights).view_as(x))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, index) of the experts of each token."""
        weights, index = self.router(x.reshape(-1, WIDTH)).softmax(-1).topk(CHOICES)
        return weights, index


def both(kind: str) -> list[str]:
    up = "gate_up_proj" if FLAGS[kind].get("has_gate", True) else "up_proj"
    return [f"experts.{up}", "experts.down_proj"]


@functools.cache
def _original(kind: str, implementation: str) -> Tiny:
    torch.manual_seed(0)
    return Tiny(kind, implementation)


def tiny(
    kind: str = "plain", implementation: str = "eager", dtype: torch.dtype = torch.float64
) -> Tiny:
    """A fresh model; the same weights for each kind."""
    return copy.deepcopy(_original(kind, implementation)).to(dtype)


def adapt(library: Any, base: Any, names: Any = ("default",), **settings: Any) -> Any:
    """The model with adapters of one library, in evaluation mode, numbers drawn by their names."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], **settings}
    model = library.get_peft_model(base, library.LoraConfig(**settings), names[0])
    for i, name in enumerate(names[1:]):
        other = {**settings, "r": settings["r"] + 1 + i}
        model.add_adapter(name, library.LoraConfig(**other))
    fill(model)
    return model.eval()


def tiny_pair(kind: str = "plain", names: Any = ("default",), **settings: Any) -> tuple[Any, Any]:
    """(peftkern's, HF PEFT's) model with equal numbers; both parameters are adapted."""
    settings = {"target_parameters": both(kind), **settings}
    return tuple(adapt(lib, tiny(kind), names, **settings) for lib in (peftkern, peft))


def alone(names: Any = ("default",), kind: str = "plain", **settings: Any) -> Any:
    """Ours alone, as of :func:`tiny_pair`, for settings that HF PEFT refuses."""
    return adapt(peftkern, tiny(kind), names, **{"target_parameters": both(kind), **settings})


def ids(batch: int = 3, length: int = 4) -> Tensor:
    return torch.arange(batch * length).view(batch, length) * 5 % VOCAB


def numbers(model: Any, *, seed: int = 3, **call: Any) -> dict[str, Tensor]:
    """The output, a loss of it, and all gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(ids(), **call)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().view_as(out)).mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "loss": loss.detach(), **grads}


def wrappers(model: Any) -> list[Any]:
    """The wrappers of the model, the outermost first."""
    return [m for m in model.modules() if isinstance(m, ParamWrapper)]


def experts_of(model: Any) -> Any:
    """The module of experts within all wrappers."""
    return wrappers(model)[0].get_base_layer()


def fused(model: Any) -> list[bool]:
    return [row.fused for row in peftkern.explain(model)]
