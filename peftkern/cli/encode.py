"""Encoding of records to token ids, and padding of examples to batches.

An encoded example is a dict of plain lists: ``input_ids`` and ``labels`` (for ``seq_cls`` an int).
A label of -100 marks a place without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .chat import IGNORE, encode_turns, has_template
from .errors import UserError
from .forms import DPO, Record
from .pairs import encode_pair

Example = dict[str, Any]


@dataclass
class Encoded:
    """Encoded examples, with the numbers of records that were cut and that have no target."""

    examples: list[Example]
    cut: int
    unusable: int


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    task: str,
    max_length: int,
    label_names: Sequence[str],
) -> Encoded:
    """Encode records for ``task``; no example is longer than ``max_length`` tokens.

    A longer plain text becomes several examples; other records are cut at their end.
    """
    ids = {name: i for i, name in enumerate(label_names)}
    out = Encoded([], 0, 0)
    for record in records:
        if task == "causal_lm" and record.turns and _as_chat(tokenizer, record):
            examples, cut = _chat(tokenizer, record, max_length)
        elif task == DPO:
            examples, cut = encode_pair(tokenizer, record, max_length)
        elif task == "causal_lm" and record.completion is None:
            examples, cut = _windows(tokenizer, record.text, max_length), False
        elif task == "causal_lm":
            examples, cut = _completion(tokenizer, record, max_length)
        elif task == "seq_2_seq_lm":
            examples, cut = _seq2seq(tokenizer, record, max_length)
        elif task == "seq_cls":
            full = tokenizer(record.text)["input_ids"]
            kept = tokenizer(record.text, truncation=True, max_length=max_length)["input_ids"]
            examples, cut = (
                [{"input_ids": kept, "labels": ids[str(record.label)]}],
                len(kept) < len(full),
            )
        else:
            examples, cut = _token_labels(tokenizer, record, max_length, ids)
        out.examples += examples
        out.cut += cut
        out.unusable += not examples
    return out


def pad_id(tokenizer: Any) -> int:
    """The id for padding: the tokenizer's, else its end-of-text, else 0 (padding is masked)."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def collator(pad: int) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
    """A function that makes a batch of n examples, padded with the id ``pad``.

    The batch has int64 tensors ``input_ids`` and ``attention_mask`` [n, L], and ``labels``: [n] if
    a label is an int, else [n, length of the longest list of labels].
    """

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        rows = [e["input_ids"] for e in examples]
        length = max(map(len, rows))
        labels = [e["labels"] for e in examples]
        if isinstance(labels[0], list):
            width = max(map(len, labels))
            labels = [row + [IGNORE] * (width - len(row)) for row in labels]
        return {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows]),
            "labels": torch.tensor(labels),
        }

    return collate


def target_count(labels: torch.Tensor, task: str) -> int:
    """The number of targets of a batch's mean loss.

    Causal models do not predict the first token.
    """
    if task == "causal_lm":
        labels = labels[:, 1:]
    return int((labels != IGNORE).sum())


def token_count(batch: dict[str, Any]) -> int:
    """The number of tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    # of a packed batch: padding is an example of its own without targets at the end of a row
    last = [row.nonzero()[-1] if row.any() else 0 for row in batch["labels"] != IGNORE]
    return int(sum(int(at) + 1 for at in last))


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _windows(tokenizer: Any, text: str, max_length: int) -> list[Example]:
    ids = _with_end(tokenizer, tokenizer(text, verbose=False)["input_ids"])
    pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    # a single token has no next token to predict
    return [{"input_ids": p, "labels": list(p)} for p in pieces if len(p) > 1]


def _as_chat(tokenizer: Any, record: Record) -> bool:
    """True unless the record has another form, for a model without a chat template (alpaca)."""
    return record.completion is None or has_template(tokenizer)


def _chat(tokenizer: Any, record: Record, max_length: int) -> tuple[list[Example], bool]:
    coded = encode_turns(tokenizer, record)
    kept = {name: values[:max_length] for name, values in coded.items()}
    usable = any(label != IGNORE for label in kept["labels"][1:])
    return ([kept] if usable else []), len(coded["input_ids"]) > max_length


def _completion(tokenizer: Any, record: Record, max_length: int) -> tuple[list[Example], bool]:
    prompt = tokenizer(record.prompt, verbose=False)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text, but the completion follows here
    ids = tokenizer(record.completion, add_special_tokens=False, verbose=False)["input_ids"]
    completion = _with_end(tokenizer, ids)
    ids = (prompt + completion)[:max_length]
    labels = ([IGNORE] * len(prompt) + completion)[:max_length]
    usable = any(label != IGNORE for label in labels[1:])
    cut = len(prompt) + len(completion) > max_length
    return ([{"input_ids": ids, "labels": labels}] if usable else []), cut


def _seq2seq(tokenizer: Any, record: Record, max_length: int) -> tuple[list[Example], bool]:
    if record.prompt is None:
        raise UserError(f"{record.origin}: --task seq_2_seq_lm takes texts, not turns")
    source = tokenizer(record.prompt, verbose=False)["input_ids"]
    target = _with_end(
        tokenizer, tokenizer(text_target=record.completion, verbose=False)["input_ids"]
    )
    cut = max(len(source), len(target)) > max_length
    if not source:
        return [], cut
    return [{"input_ids": source[:max_length], "labels": target[:max_length]}], cut


def _token_labels(
    tokenizer: Any, record: Record, max_length: int, ids: dict[str, int]
) -> tuple[list[Example], bool]:
    """Encode a record of tokens; only the first piece of each word has the word's label."""
    if not tokenizer.is_fast:
        raise UserError("--task token_cls needs a fast tokenizer, which this model does not have")
    coded = tokenizer(
        record.tokens, is_split_into_words=True, truncation=True, max_length=max_length
    )
    labels, last, seen = [], None, 0
    for word in coded.word_ids():
        first = word is not None and word != last
        labels.append(ids[record.labels[word]] if first else IGNORE)
        seen += first
        last = word if word is not None else last
    if not seen:
        return [], seen < len(record.tokens)
    return [{"input_ids": coded["input_ids"], "labels": labels}], seen < len(record.tokens)
