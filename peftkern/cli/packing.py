"""``--packing``: several examples in a row, so that little of a batch is padding.

Each example begins with position 0. transformers' attention masks, and FlashAttention, keep tokens
apart whose positions begin anew, where there is no attention mask; a model of which that is not so
is found by trying it (:func:`sees_across`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..utils.undo import in_mode
from .chat import IGNORE

Example = dict[str, Any]


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Rows of whole examples of at most ``max_length`` tokens, by best fit, the longest first.

    A row has ``input_ids``, ``labels`` and ``position_ids``. The first token of an example has no
    loss: it would be predicted from another one.
    """
    longest_first = sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i))
    room: list[tuple[int, int]] = []  # (free places, number of the row), sorted
    rows: list[list[int]] = []
    for i in longest_first:
        length = len(examples[i]["input_ids"])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([i])
            free, row = max_length - length, len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(i)
            free -= length
        insort(room, (free, row))
    return [_joined([examples[i] for i in sorted(row)]) for row in rows]


def _joined(examples: Sequence[Example]) -> Example:
    joined: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        joined["input_ids"] += example["input_ids"]
        joined["labels"] += [IGNORE, *example["labels"][1:]]
        joined["position_ids"] += range(len(example["input_ids"]))
    return joined


def packed_collator(pad: int) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
    """A function that makes a batch of packed rows: ``input_ids``, ``labels``, ``position_ids``.

    All are int64 [n, L]. There is no ``attention_mask``: padding is an example of its own at the
    end of a row, which no other token sees.
    """

    def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        filled: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            free = length - len(row["input_ids"])
            filled["input_ids"].append(row["input_ids"] + [pad] * free)
            filled["labels"].append(row["labels"] + [IGNORE] * free)
            filled["position_ids"].append(row["position_ids"] + list(range(free)))
        return {name: torch.tensor(values) for name, values in filled.items()}

    return collate


@torch.no_grad()
def sees_across(model: Any) -> bool:
    """True when the logits of an example in a packed row depend on the example before it.

    The model computes two rows of two examples, which differ in the first one alone.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(8) % vocabulary
    rows = torch.stack([tokens, tokens])
    rows[1, :4] = (rows[1, :4] + vocabulary // 2) % vocabulary
    positions = (torch.arange(8) % 4).expand(2, 8)
    cached = model.config.use_cache
    model.config.use_cache = False  # as in training; a cache would be taken for earlier tokens
    try:
        with in_mode(model, training=False):
            device = model.device
            logits = model(input_ids=rows.to(device), position_ids=positions.to(device)).logits
    finally:
        model.config.use_cache = cached
    second = logits[:, 4:].float()
    # a row of experts may be added up in another order
    most = 64 * torch.finfo(logits.dtype).eps * float(second.abs().max())
    return float((second[0] - second[1]).abs().max()) > most
