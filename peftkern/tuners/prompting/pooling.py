"""The token that a decoder's classifier reads after a prompt: the last one that is not padding.

transformers' decoders look for it among the input ids. Given embeddings, as with a prompt, they
take the last place of the row, which with padding on the right is a padding token. So the heads are
given the place of the last real token, and copy its scores to the last place.
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
    """The place of each row's last real token among a call's own tokens, int64 [B].

    When the model has a pad token and is given ids, this is the last token that is no pad token, as
    by the model's own rule; else the last one that the mask shows. None without any of these.
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
    """A context in which a classifier's heads give the scores of each row's last real token.

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
