"""HF PEFT's address of the configurations' base classes. A version that is put into ``__version__``
here is written into configurations that are made afterwards, as in HF PEFT."""

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
