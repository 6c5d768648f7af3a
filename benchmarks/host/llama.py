"""The Llama shapes that are measured, and a model of each provider.

Proportions are those of Llama 3: heads of 64, four query heads to a key/value head, an MLP 3.5
times as wide as the model. The vocabulary is smaller, like the width, so that the output head has
about 15% of the weights in products, similar to real models (8B: 7%, 1B: 21%). With 128256 tokens
the head, which is never adapted, would be most of such a narrow model.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern

from .measure import BARE, OURS, PEFT

HEAD = 64
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIBRARIES: dict[str, Any] = {PEFT: peft, OURS: peftkern}


@dataclass(frozen=True)
class Shape:
    """A decoder; ``hidden`` is a multiple of 256, or 128."""

    name: str
    hidden: int
    layers: int
    vocab: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 7 // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // HEAD,
            num_key_value_heads=max(1, self.hidden // HEAD // 4),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,  # so that generation always writes all tokens
            pad_token_id=0,
        )

    def __str__(self) -> str:
        return f"{self.name} {self.hidden}x{self.layers}"


TINY = Shape("tiny", hidden=128, layers=2, vocab=512)
SMALL = Shape("small", hidden=256, layers=4, vocab=2048)
MEDIUM = Shape("medium", hidden=512, layers=8, vocab=8192)
DEEP = Shape("deep", hidden=256, layers=32, vocab=2048)


def build(shape: Shape) -> LlamaForCausalLM:
    """A frozen float32 model in evaluation mode, with the same drawn weights at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config()).eval().requires_grad_(False)


def share(model: nn.Module) -> Any:
    """A copy of the modules that shares the parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def lora_config(library: Any, targets: Any = "all-linear", p: float = 0.0) -> Any:
    """A LoRA config with the library's defaults (r=8, lora_alpha=8) but for targets and dropout."""
    return library.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=p)


def adapt(library: Any, model: nn.Module, config: Any) -> Any:
    """``get_peft_model`` on a copy that shares the model's weights, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(share(model), config)


def trio(base: nn.Module, targets: Any = "all-linear", p: float = 0.0) -> dict[str, Any]:
    """{provider: model}: the bare model and both libraries', with equal adapters and B not zero."""
    models = {BARE: base}
    for name, library in LIBRARIES.items():
        torch.manual_seed(0)
        models[name] = adapt(library, base, lora_config(library, targets, p))
    equalise(models[PEFT], models[OURS])
    return models


def equalise(theirs: nn.Module, ours: nn.Module) -> None:
    """Draw HF PEFT's B, which starts at zero, and give peftkern the same A and B."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    # theirs alone: quantised weights are loaded in ways of their owners, and are equal already
    adapters = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    missing, unexpected = ours.load_state_dict(adapters, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing)


def tokens(shape: Shape, batch: int, length: int) -> Tensor:
    """Drawn token ids [batch, length], int64, without special ones."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, shape.vocab, (batch, length), generator=generator)
