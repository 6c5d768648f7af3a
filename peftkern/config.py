"""HF PEFT's address of the configurations' base classes.

As in HF PEFT, the value of ``__version__`` here is written into configurations that are made later.
"""

from ._version import PEFT_COMPAT_VERSION as __version__
from .configs.base import PeftConfig, PeftConfigMixin
from .configs.prompt_learning import PromptLearningConfig
from .utils.constants import CONFIG_NAME
from .utils.peft_types import PeftType, TaskType

__all__ = [
    "CONFIG_NAME",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "PromptLearningConfig",
    "TaskType",
    "__version__",
]
