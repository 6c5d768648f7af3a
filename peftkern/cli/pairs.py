"""Examples of preferences: a prompt with a chosen and a rejected answer, for TRL's DPO."""

from __future__ import annotations

import json
from typing import Any

from .chat import as_text
from .forms import Record


def encode_pair(
    tokenizer: Any, record: Record, max_length: int
) -> tuple[list[dict[str, Any]], bool]:
    """([the fields prompt, chosen, rejected for TRL], whether it will be cut).

    The list is empty when the prompt alone fills ``max_length``. UserError when a chat template is
    missing, or refuses the turns.
    """
    chosen, rejected = record.answers or ("", "")
    prompt: Any = record.prompt
    if record.turns:
        prompt = record.turns
        chats = [Record(record.origin, turns=[*prompt, *said], tools=record.tools)
                 for said in (chosen, rejected)]  # fmt: skip
        texts = [as_text(tokenizer, chat) for chat in chats]
        asked = as_text(tokenizer, Record(record.origin, turns=prompt, tools=record.tools))
    else:
        texts, asked = [prompt + chosen, prompt + rejected], prompt

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=not record.turns, verbose=False)["input_ids"])

    if length(asked) >= max_length:
        return [], True
    example = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if record.tools:
        example["tools"] = json.dumps(record.tools)
    return [example], max(map(length, texts)) > max_length
