"""``PromptLearningConfig``: the fields that prefix tuning, prompt tuning and p-tuning share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.peft_types import PeftType, TaskType
from .base import PeftConfig
from .checks import positive
from .names import as_names

MAX_TOKENS = 65536  # for a longer prompt the saved tensor is compared before memory is allocated


@dataclass
class PromptLearningConfig(PeftConfig):
    """The base class of the configurations of prefix tuning, prompt tuning and p-tuning.

    Sizes that are None are taken from the model.

    Args:
        num_virtual_tokens: length of the learned prompt, in tokens.
        token_dim: size of one virtual token.
        num_transformer_submodules: 1, or 2 for encoder-decoder models.
        num_attention_heads: number of heads of keys and values.
        num_layers: number of layers of the base model.
        modules_to_save: modules trained and saved in full beside the prompt.
    """

    num_virtual_tokens: int | None = field(default=None)
    token_dim: int | None = field(default=None)
    num_transformer_submodules: int | None = field(default=None)
    num_attention_heads: int | None = field(default=None)
    num_layers: int | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules_to_save = as_names("modules_to_save", self.modules_to_save)
        for name in (
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ):
            positive(name, getattr(self, name), optional=True)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(
                "`num_transformer_submodules` must be 1, or 2 for an encoder-decoder model, got "
                f"{self.num_transformer_submodules}"
            )

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def trains_network(self) -> bool:
        """True when a network computes the prompt; no checkpoint holds its weights."""
        return False

    def check_supported(self) -> None:
        """Raise a ValueError when a field that the adapter needs has no or a wrong value."""
        positive("num_virtual_tokens", self.num_virtual_tokens)
        if self.task_type is None:
            raise ValueError(
                f"`task_type` must be given for {PeftType(self.peft_type or '').value}: what is "
                "done to masks and labels depends on it. Must be one of: "
                f"{', '.join(t.value for t in TaskType)}."
            )

    def check_fits(self, weights: Mapping[str, Any]) -> None:
        prompt = weights.get("prompt_embeddings")
        if prompt is None or prompt.dim() != 2:
            return  # the check of keys reports this with all other missing or wrong keys
        if (self.num_virtual_tokens or 0) > max(MAX_TOKENS, prompt.shape[0]):
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens}, and the saved prompt has "
                f"{prompt.shape[0]} rows"
            )

    def check_loadable(self, is_trainable: bool) -> None:
        if is_trainable and self.trains_network:
            raise ValueError(
                "Cannot set a prompt learning adapter to trainable when loading pretrained adapter."
                " The file holds the prompt, and not the network of "
                f"{PeftType(self.peft_type or '').value} that made it: load it with "
                "is_trainable=False."
            )
