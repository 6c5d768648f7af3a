"""``BasePromptEncoder``: makes virtual tokens by an embedding and, for some methods, a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...utils.gathering import gathered_device, has_hooks, is_whole


class BasePromptEncoder(nn.Module):
    """The virtual tokens of one adapter, by index.

    A subclass makes ``embedding``. When a network that still trains computes the tokens, it also
    overrides :attr:`has_network` and :meth:`through_network`. Without a network the embedding's
    rows are the tokens; a saved adapter has this form.
    """

    embedding: nn.Embedding

    @property
    def has_network(self) -> bool:
        """True when a network computes the tokens, so that more than the tokens is trained."""
        return False

    def through_network(self, tokens: Tensor) -> Tensor:
        """Run the network: […, P, dim of the embedding] -> […, P, dim of a virtual token]."""
        return tokens

    def forward(self, indices: Tensor) -> Tensor:
        """Virtual tokens by index: [batch, P] -> [batch, P, dim]."""
        return self.through_network(self.embedding(indices))

    def prompt(self) -> Tensor:
        """All virtual tokens, [P, dim]; without a network the trained parameter, not a copy."""
        weight = self.embedding.weight
        if not self.has_network and is_whole(self.embedding) and not has_hooks(self):
            return weight
        return called(self)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copy saved virtual tokens [P, dim] in.

        Raises:
            ValueError: another shape, or an encoder with a network, whose weights do not follow
                from the tokens.
        """
        if self.has_network:
            raise ValueError(
                "Cannot load prompt embeddings into an encoder with a network: they are its "
                "output, from which its weights cannot be told."
            )
        here, given = tuple(self.embedding.weight.shape), tuple(prompt_embeddings.shape)
        if here != given:
            raise ValueError(f"Invalid `prompt_embeddings` shape: expected {here}, got {given}.")
        weight = self.embedding.weight
        if weight.is_meta:  # copying to the meta device would lose the values
            data = prompt_embeddings.detach().to(weight.dtype, copy=True)
            self.embedding.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
            return
        with torch.no_grad():
            weight.copy_(prompt_embeddings)

    def _load_adapter_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load saved tokens; called by HF PEFT's ``set_peft_model_state_dict``.

        (accelerate passes models to that function.)
        """
        self.load_prompt_embeddings(state_dict["prompt_embeddings"])


def virtual_tokens(encoder: Any) -> Tensor:
    """All virtual tokens [P, dim] of an encoder, or of the module that FSDP has put around it."""
    return encoder.prompt() if isinstance(encoder, BasePromptEncoder) else called(encoder)


def called(encoder: Any) -> Tensor:
    """All virtual tokens [P, dim] by a call, in which FSDP and DeepSpeed gather the weights."""
    embedding = encoder.embedding
    indices = torch.arange(embedding.num_embeddings, device=gathered_device(embedding.weight))
    return encoder(indices[None])[0]
