"""HF PEFT's address of ``PrefixTuningConfig``."""

from ...configs.prefix_tuning import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
