"""HF PEFT's other address of :func:`peftkern.get_peft_model`."""

from .mapping import get_peft_model

__all__ = ["get_peft_model"]
