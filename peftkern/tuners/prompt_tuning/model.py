"""``PromptEmbedding``: virtual tokens, trained directly, before the input's embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...configs.prompt_tuning import PromptTuningConfig, PromptTuningInit
from ...utils.collectives import from_first_rank
from ...utils.gathering import is_shard
from ...utils.zero3 import gathered
from ..prompting.encoder import BasePromptEncoder


class PromptEmbedding(BasePromptEncoder):
    """Virtual tokens [P, token_dim], P being num_virtual_tokens * num_transformer_submodules.

    Args:
        config: with its sizes filled in. Unless it is in inference mode, ``prompt_tuning_init``
            selects the first values.
        word_embeddings: the model's. For SAMPLE_VOCAB and TEXT the tokens start as copies of its
            vectors.

    Raises:
        ValueError: the text of ``prompt_tuning_init_text`` has no tokens.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: Any) -> None:
        super().__init__()
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        total = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        self.embedding = nn.Embedding(total, config.token_dim)
        how = PromptTuningInit(config.prompt_tuning_init)
        if config.inference_mode or how is PromptTuningInit.RANDOM:
            return
        if how is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, word_embeddings.num_embeddings, (total,))
        else:
            ids = _text_ids(config, total)
        start = _vectors(word_embeddings, ids)
        if start.shape != self.embedding.weight.shape:
            raise ValueError(
                f"`token_dim` is {config.token_dim}, but the model's word embeddings have "
                f"{start.shape[-1]} numbers, and prompt_tuning_init={how.value} copies them"
            )
        self.embedding.weight = nn.Parameter(start)


def _vectors(word_embeddings: nn.Module, ids: Tensor) -> Tensor:
    """The word vectors of these ids, float32 [n, token_dim]."""
    device = next(word_embeddings.parameters()).device
    if device.type != "meta":  # on meta a hook of accelerate loads them, for ids on any device
        ids = ids.to(device)
    if is_shard(weight := getattr(word_embeddings, "weight", None)):
        # every rank looks the same tokens up, of which each has a part
        ids = from_first_rank(ids, weight.device_mesh.get_group())  # type: ignore[union-attr]
    with torch.no_grad(), gathered(word_embeddings.parameters()):
        return word_embeddings(ids).clone().float()  # on meta if the vectors are not loaded yet


def _text_ids(config: PromptTuningConfig, total: int) -> Tensor:
    """The token ids of the text, int64 [total]; the text is cut or repeated to that length."""
    import transformers

    # an adapter's file may come from anyone, so it must not be able to run code
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"`prompt_tuning_init_text` has no tokens: {config.prompt_tuning_init_text!r}"
        )
    return torch.tensor((ids * (total // len(ids) + 1))[:total])
