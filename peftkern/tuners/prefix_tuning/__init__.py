"""Prefix tuning (Li and Liang, 2021, arXiv 2101.00190)."""

from typing import TYPE_CHECKING

from ...configs.prefix_tuning import PrefixTuningConfig
from ...utils.lazy import lazily
from .model import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]

if not TYPE_CHECKING:  # finds the files at HF PEFT's addresses, which nothing here imports
    __getattr__ = lazily(__name__, {})[1]
