"""Warnings that callers of HF PEFT filter by class."""

from __future__ import annotations


class PeftWarning(UserWarning):
    """The base class of peftkern's own warnings."""
