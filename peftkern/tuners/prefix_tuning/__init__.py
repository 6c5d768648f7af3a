"""Prefix tuning (Li and Liang, 2021): the configuration; the model is not built yet."""

from .config import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
