"""Reasons for slow ways, logged once: every layer of every step has the same ones."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("peftkern")

_said: set[tuple[Any, ...]] = set()


def first_time(*what: Any) -> bool:
    """True when nobody has asked with these in this process before; never while torch.compile is
    tracing, where a logger is nothing to compile."""
    if torch.compiler.is_compiling() or what in _said:
        return False
    _said.add(what)
    return True


def note_once(words: str, *args: Any, level: int = logging.INFO) -> None:
    """Log ``words % args``, once in a process."""
    if first_time(words, *args):
        logger.log(level, words, *args)


def note_new(layer: Any, slot: str, reason: str | None, words: str) -> None:
    """Log ``words``, with the layer's class and the reason, unless the last reason of this layer
    was the same; the layer keeps it as attribute ``slot``."""
    state = layer.__dict__
    if reason is not None and reason != state.get(slot):
        state[slot] = reason
        logger.info(words, type(layer).__name__, reason)
