"""Logs each reason for a slow way once, as every layer of every step has the same ones."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("peftkern")

_said: set[tuple[Any, ...]] = set()


def first_time(*what: Any) -> bool:
    """True at the first call with these arguments in this process.

    False while torch.compile is tracing, as it cannot compile a logger.
    """
    if torch.compiler.is_compiling() or what in _said:
        return False
    _said.add(what)
    return True


def note_once(words: str, *args: Any, level: int = logging.INFO) -> None:
    """Log ``words % args``, once in a process."""
    if first_time(words, *args):
        logger.log(level, words, *args)


def note_new(layer: Any, slot: str, reason: str | None, words: str) -> None:
    """Log ``words % (the layer's class, reason)`` unless the layer's last reason was the same.

    The layer keeps the reason in its attribute ``slot``.
    """
    state = layer.__dict__
    if reason != state.get(slot):
        state[slot] = reason
        if reason is not None:
            logger.info(words, type(layer).__name__, reason)
