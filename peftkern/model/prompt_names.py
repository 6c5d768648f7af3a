"""``PromptNames``: HF PEFT's attributes and methods of a model with prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..tuners.prompting.tuner import word_embeddings
from ..tuners.wrapped import innermost
from ..utils.peft_types import PeftType


class PromptNames:
    """The mixin of :class:`peftkern.PeftModel` for prompts.

    Attributes:
        prompt_encoder: ModuleDict, {adapter name: encoder of its virtual tokens}.
        prompt_tokens: {adapter name: indices of its virtual tokens}.
    """

    tuner: Any
    base_model: Any
    prompt_encoder: nn.ModuleDict
    prompt_tokens: dict[str, Tensor]
    peft_type: Any

    @property
    def _is_prompt_learning(self) -> bool:  # HF PEFT's attribute, which callers may read
        return PeftType(self.peft_type) is not PeftType.LORA

    @property
    def transformer_backbone_name(self) -> str:
        """The name of the first transformers model among the base model's children."""
        from transformers import PreTrainedModel

        for name, module in self.base_model.named_children():
            if isinstance(module, PreTrainedModel):
                return name
        raise AttributeError(f"{type(self.base_model).__name__} has no backbone as a child")

    @property
    def word_embeddings(self) -> nn.Module:
        """The model's present input embeddings."""
        found = word_embeddings(self)
        if found is None:
            raise AttributeError(f"{type(innermost(self)).__name__} has no input embeddings")
        return found

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The virtual tokens as a file holds them, [rows, numbers of a row], on the CPU.

        A prefix is [P, num_layers * 2 * token_dim]; a prompt [P * num_transformer_submodules,
        token_dim].
        """
        encoder: Any = self.prompt_encoder[adapter_name]
        # not under no_grad, as an LSTM's last bits depend on it
        return encoder.prompt().detach().clone().cpu()

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """The active adapter's prompt for a batch, in HF PEFT's form.

        Args:
            batch_size: rows of the batch.
            task_ids: accepted for HF PEFT's callers, without effect.
            max_cache_len: the same.

        Returns:
            A tensor [batch, P * num_transformer_submodules, token_dim]. For prefix tuning, a
            transformers cache with [batch, H_kv, P, D] for each layer (an ``EncoderDecoderCache``
            with two submodules); calls of the model itself do not use it.
        """
        return self.tuner.in_hf_form(self, batch_size)
