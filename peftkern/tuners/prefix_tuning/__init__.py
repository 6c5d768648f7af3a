"""Prefix tuning (Li and Liang, 2021, arXiv 2101.00190)."""

from ...configs.prefix_tuning import PrefixTuningConfig
from .model import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]
