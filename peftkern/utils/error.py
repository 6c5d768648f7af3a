"""Errors that callers of HF PEFT catch by class."""

from __future__ import annotations


class PeftError(Exception):
    """Base of the errors that have a class of their own."""


class MissingKeysError(PeftError, ValueError, TypeError):
    """A file is no adapter's configuration. HF PEFT raises a TypeError, as this is one too."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration matched no module and no parameter of the base model.

    Whoever adds such an adapter on purpose (one that trains ``modules_to_save`` alone, say) can
    catch it; the model is as it was.
    """
