"""Regular expressions of an adapter's configuration, matched as by :mod:`re`, with a time limit.

Anybody may have written the file of a configuration, and a pattern with nested repetitions can run
practically for ever on one name. :mod:`re` cannot be interrupted. So :mod:`re` runs, fast, only
patterns whose repetitions cannot multiply; the ``regex`` package runs all others, under a time
limit.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from typing import Any

# seconds of processor time: limit for one name, limit for all long ones together, a long one
ONE_NAME, IN_ALL, LONG = 0.25, 1.0, 0.005
# number of repetitions, options and alternatives with which :mod:`re` may still run a pattern
_FREE = 5
# limits of nesting and length: regex compiles each nested repetition to a graph of twice the size
_DEEPEST, _LONGEST = 8, 20_000
_QUANTIFIER = re.compile(r"\{(?:\d+,?\d*|,\d*)\}")
_VERBOSE = re.compile(r"\(\?[aiLmsu]*x")


class Pattern:
    """A compiled pattern, with ``match`` and ``fullmatch`` as those of :func:`re.compile`.

    Args:
        text: the pattern.
        field: the setting that it belongs to, for errors.
        shown: the text in the file, if ``text`` was made from it, for errors.

    Raises:
        ValueError: it is no regular expression, or its repetitions are nested too deeply. ``match``
            and ``fullmatch`` raise one when it takes too long.
    """

    def __init__(self, text: Any, field: str, shown: Any = None) -> None:
        self.field, self.shown = field, text if shown is None else shown
        weight, depth, same = _look(text) if isinstance(text, str) else (0, 0, "")
        limited = depth > 0 or weight > _FREE
        if limited and (depth > _DEEPEST or len(text) > _LONGEST):
            raise ValueError(
                f"`{field}` holds {_short(self.shown)}, which cannot be matched within a time "
                f"limit: it has {len(text)} characters and {depth} levels of repetition; allowed "
                f"are {_LONGEST} and {_DEEPEST}"
            )
        try:
            plain = re.compile(text)
        except (re.error, TypeError, RecursionError, OverflowError) as exc:
            raise ValueError(
                f"`{field}` holds {_short(self.shown)}, which is not a regular expression: {exc}"
            ) from exc
        if not limited:
            self.match: Any = plain.match
            self.fullmatch: Any = plain.fullmatch
            return
        import regex  # takes 0.1 s, which most adapters do not need; transformers requires it

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # re has given the warning already
            timed = regex.compile(same)
        self._spent = 0.0
        self.match = functools.partial(self._limited, timed.match)
        self.fullmatch = functools.partial(self._limited, timed.fullmatch)

    def _limited(self, match: Any, name: str) -> Any:
        start = time.thread_time()
        try:
            found = match(name, timeout=ONE_NAME)
        except (TimeoutError, MemoryError):
            raise self._too_long(name) from None
        took = time.thread_time() - start
        if took > LONG:
            self._spent += took
            if self._spent > IN_ALL:
                raise self._too_long(name)
        return found

    def _too_long(self, name: str) -> ValueError:
        return ValueError(
            f"`{self.field}` holds {_short(self.shown)}, which takes too long to match: more than "
            f"{ONE_NAME:g} s for the name {name!r}, or {IN_ALL:g} s for all. Repetitions within "
            "repetitions do that; write it without them."
        )


def _short(pattern: Any) -> str:
    shown = repr(pattern)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


@functools.lru_cache(maxsize=1024)
def whole(pattern: str, field: str) -> Pattern:
    """``pattern`` compiled for whole names (``fullmatch``); cached, as many names are matched."""
    return Pattern(pattern, field)


@functools.lru_cache(maxsize=4096)
def ending(pattern: str, field: str) -> Pattern:
    """``pattern`` compiled for a whole name or its end from a dot on (``match``); cached."""
    return Pattern(rf"(.*\.)?({pattern})$", field, pattern)


def _look(text: str) -> tuple[int, int, str]:
    """The parts that could make a pattern slow, and the pattern in the syntax of ``regex``.

    Returns:
        weight: number of parts that may match in several ways.
        depth: number of nested repetitions of groups; 0: no group is repeated.
        same: the pattern for ``regex``, which gives ``{e<=1}`` and ``[[:alpha:]]`` other meanings.
    """
    if _VERBOSE.search(text):  # a verbose pattern, in which any part may be a comment
        return _FREE + 1, max(1, sum(text.count(c) for c in "*+{")), text
    weight, out, at = 0, [], 0
    groups = [[0, 0]]  # for each open group: depth of the repetitions in it, 1 if it has "|"
    inside = 0  # depth of the repetitions in the part before this place
    is_group = after_quantifier = False
    while at < len(text):
        char, step = text[at], 1
        quantifier = _QUANTIFIER.match(text, at) if char == "{" else None
        if char in "*+?" or quantifier:
            step = len(quantifier[0]) if quantifier else 1
            piece = text[at : at + step]
            if not after_quantifier:  # else it makes the quantifier before it lazy or possessive
                weight += 1
                if is_group and char != "?":
                    inside += 1
                groups[-1][0] = max(groups[-1][0], inside)
            after_quantifier = not after_quantifier
        else:
            after_quantifier = is_group = False
            inside = 0
            piece = char
            if char == "\\":
                step = 2
                piece = text[at : at + 2]
                weight += piece[1:].isdigit()  # a reference to a group
            elif char == "[":
                piece, step = _class(text, at)
            elif text.startswith("(?#", at):
                step = max(text.find(")", at), at) + 1 - at
                piece = ""
            elif char == "(":
                groups.append([0, 0])
                step = 2 if text.startswith("(?", at) else 1
                piece = text[at : at + step]
            elif char == ")" and len(groups) > 1:
                inside, is_group = groups.pop()[0], True
                groups[-1][0] = max(groups[-1][0], inside)
            elif char == "|":
                weight += not groups[-1][1]
                groups[-1][1] = 1
            elif char == "{":
                piece = "\\{"
        out.append(piece)
        at += step
    return weight, groups[0][0], "".join(out)


def _class(text: str, start: int) -> tuple[str, int]:
    """(the set of characters at ``start`` in the syntax of ``regex``, its length in ``text``)."""
    at = start + 1 + text.startswith("^", start + 1)
    out = text[start:at]
    first = at
    while at < len(text) and (text[at] != "]" or at == first):
        step = 2 if text[at] == "\\" else 1
        out += "\\[" if text[at] == "[" else text[at : at + step]
        at += step
    return out + "]", at + 1 - start
