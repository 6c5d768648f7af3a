"""Errors that callers of HF PEFT catch by class."""

from __future__ import annotations


class PeftError(Exception):
    """The base class of peftkern's own error classes."""


class MissingKeysError(PeftError, ValueError, TypeError):
    """A file is not an adapter's configuration; also a TypeError, which HF PEFT raises."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration matched no module and no parameter of the base model.

    The model is then as it was. A caller who adds such an adapter on purpose (for example one that
    trains only ``modules_to_save``) can catch it.
    """
