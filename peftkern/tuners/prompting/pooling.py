"""Which token a decoder's classifier reads behind a prompt: the last one that is no padding.

transformers' decoders look for it among the input ids, and take the last place of the row where
they are given embeddings, as they are behind a prompt. With padding on the right that is a padding
token. The heads get told where to look instead: they put the scores of the last real token in the
last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...utils.handing import handing
from ..modules_to_save import ModulesToSaveWrapper
from ..wrapped import innermost


def last_tokens(base: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """[B]: the place of each row's last real token among a call's own tokens; None where nothing
    says which ones are padding.

    It is the last one that is no pad token where the model has such a token and is given ids, as
    its own rule is, else the last one that the mask shows.
    """
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else None
    pad = getattr(config or base.config, "pad_token_id", None)
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is not None and pad is not None and kwargs.get("inputs_embeds") is None:
        real = ids != pad
    elif mask is not None and mask.dim() == 2:
        real = mask != 0
    else:
        return None
    return (torch.arange(1, real.shape[1] + 1, device=real.device) * real).argmax(-1)


@contextmanager
def reading_last_tokens(model: Any, kwargs: dict[str, Any], virtual: int) -> Iterator[None]:
    """Within the block the heads of a classifier's task read behind each row's last real token.

    Args:
        model: a PeftModel with a prompt in front of the input.
        kwargs: the call, without the prompt.
        virtual: tokens that the prompt puts in front.
    """
    base = innermost(model)
    heads = [getattr(base, name, None) for name in model.head_names]
    wrappers = [head for head in heads if isinstance(head, ModulesToSaveWrapper)]
    found = last_tokens(base, kwargs) if wrappers and model.pools_last_token else None
    if found is None:
        yield
        return
    with handing({head: {"last_tokens": found + virtual} for head in wrappers}):
        yield
