"""Chats: the token ids of turns by the tokenizer's chat template, with loss on the assistant's.

Which tokens are the assistant's is told by the template itself where it has ``{% generation %}``
markers. Else the text of the turns before one of the assistant's, with the prompt for it, is a
prefix of the text of all, and so is the text that ends with it; both are checked.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from .errors import UserError, first_line
from .forms import Record

IGNORE = -100
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_template(path: str) -> tuple[str, str]:
    """(the chat template in a file, its sha256); UserError when it is no template of Jinja."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """The tag {% generation %}, which is transformers' own."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--chat-template {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--chat-template {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {path}: not valid UTF-8") from None
    try:
        Environment(extensions=[Generation, loopcontrols]).parse(text)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat-template {path}:{error.lineno}: {error.message}") from None
    if not text.strip():
        raise UserError(f"--chat-template {path}: is empty")
    return text, hashlib.sha256(text.encode()).hexdigest()


def has_template(tokenizer: Any) -> bool:
    """True when the tokenizer can write turns as text."""
    return bool(getattr(tokenizer, "chat_template", None))


def has_markers(tokenizer: Any, tools: Any = None) -> bool:
    """True when the template marks what the assistant says."""
    return bool(_MARKER.search(tokenizer.get_chat_template(tools=tools)))


def how_marked(tokenizer: Any) -> str:
    """A line that says how the assistant's turns are found."""
    way = "the template's generation markers" if has_markers(tokenizer) else "prefixes of the text"
    return f"chat template: loss on the assistant's turns, found by {way}"


def encode_turns(tokenizer: Any, record: Record) -> dict[str, list[int]]:
    """The ``input_ids`` of all turns, and ``labels`` that are -100 outside the assistant's.

    UserError, with the record's origin, when there is no template, it refuses the turns, or what
    it writes of the assistant cannot be found.
    """
    _refuse_no_template(tokenizer, record)
    if not tokenizer.is_fast:
        raise UserError("chats need a fast tokenizer, which this model does not have")
    if record.from_turn == 0 and has_markers(tokenizer, record.tools):
        return _by_markers(tokenizer, record)
    return _by_prefixes(tokenizer, record)


def as_text(tokenizer: Any, record: Record) -> str:
    """The turns as the template writes them; UserError as in :func:`encode_turns`."""
    _refuse_no_template(tokenizer, record)
    return str(_render(tokenizer, record, len(record.turns), tokenize=False))


def _refuse_no_template(tokenizer: Any, record: Record) -> None:
    if not has_template(tokenizer):
        raise UserError(
            f"{record.origin}: turns need a chat template, and the model's tokenizer has none; "
            "give one with --chat-template FILE"
        )


def _by_markers(tokenizer: Any, record: Record) -> dict[str, list[int]]:
    coded = _render(
        tokenizer, record, len(record.turns),
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, mask = coded["input_ids"], coded["assistant_masks"]
    if not any(mask):
        raise UserError(f"{record.origin}: the chat template marks no token as the assistant's")
    return _labelled(ids, mask)


def _by_prefixes(tokenizer: Any, record: Record) -> dict[str, list[int]]:
    full = _render(tokenizer, record, len(record.turns), tokenize=False)
    spans = []
    for i, turn in enumerate(record.turns):
        if turn["role"] != "assistant" or i < record.from_turn:
            continue
        before = _render(tokenizer, record, i, tokenize=False, add_generation_prompt=True)
        until = _render(tokenizer, record, i + 1, tokenize=False)
        if not (full.startswith(until) and until.startswith(before)):
            raise UserError(
                f"{record.origin}: the chat template writes turn {i + 1} otherwise when more turns "
                "follow or its prompt comes first, so the assistant's part cannot be found; give a "
                "template that marks it with {% generation %}: --chat-template FILE"
            )
        spans.append((len(before), len(until)))
    coded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [
        int(any(start <= begin < end for start, end in spans) and begin < stop)
        for begin, stop in coded["offset_mapping"]
    ]
    return _labelled(coded["input_ids"], mask)


def _labelled(ids: list[int], mask: list[int]) -> dict[str, list[int]]:
    labels = [token if on else IGNORE for token, on in zip(ids, mask, strict=True)]
    return {"input_ids": list(ids), "labels": labels}


def _render(tokenizer: Any, record: Record, count: int, **how: Any) -> Any:
    """The first ``count`` turns as the template writes them ("" for none)."""
    from jinja2 import TemplateError

    if not count:
        return ""
    try:
        return tokenizer.apply_chat_template(record.turns[:count], tools=record.tools, **how)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise UserError(
            f"{record.origin}: the chat template refuses the turns: {reason}"
        ) from error
