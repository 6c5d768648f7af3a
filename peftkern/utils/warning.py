"""Warnings that callers of HF PEFT filter by class."""

from __future__ import annotations


class PeftWarning(UserWarning):
    """Base of the warnings that have a class of their own."""
